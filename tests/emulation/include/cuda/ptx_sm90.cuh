// Replaces csrc/cuda/ptx_sm90.cuh: each of its instructions in C++, on top of the machine's asynchronous part.
#pragma once

#include <cuda.h>

#include "async.h"
#include "cuda/common.cuh"

namespace torchweld::cuda::ptx {

// ---- Barriers

using emulation::Place;

inline void barrier_sync(int barrier, int threads, Place place = emulation::here()) {
  emulation::barrier("bar.sync", barrier, threads, place);
}
inline void barrier_arrive(int barrier, int threads, Place place = emulation::here()) {
  emulation::arrive("bar.arrive", barrier, threads, place);
}

inline void mbarrier_init(uint32_t barrier, uint32_t count) { emulation::mbarrier_init(barrier, count); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t barrier) { emulation::mbarrier_arrive(barrier); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulation::mbarrier_expect(barrier, bytes);
  emulation::mbarrier_arrive(barrier);
}
inline bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) { return emulation::mbarrier_test(barrier, parity); }
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulation::mbarrier_wait(barrier, parity); }

inline void fence_proxy_async() { emulation::fence_async(); }

// ---- Bulk copies

inline void prefetch(const CUtensorMap*) {}

template <class... Coordinates>
void tensor_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, Coordinates... coordinates) {
  const int32_t at[] = {coordinates...};
  emulation::bulk_load(emulation::box(map, at, to), barrier);
}
template <class... Coordinates>
void tensor_store(const CUtensorMap* map, uint32_t from, Coordinates... coordinates) {
  const int32_t at[] = {coordinates...};
  emulation::bulk_store(emulation::box(map, at, from), emulation::Reduction::none);
}
template <class... Coordinates>
void tensor_add(const CUtensorMap* map, uint32_t from, Coordinates... coordinates) {
  const int32_t at[] = {coordinates...};
  emulation::bulk_store(emulation::box(map, at, from), emulation::box_sum(map));
}

inline void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  emulation::bulk_load(emulation::neighbours(to, const_cast<void*>(from), bytes), barrier);
}
inline void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  emulation::bulk_store(emulation::neighbours(from, to, bytes), emulation::Reduction::none);
}
inline void bulk_add(float* to, uint32_t from, uint32_t bytes) {
  emulation::bulk_store(emulation::neighbours(from, to, bytes), emulation::Reduction::add_float);
}
inline void bulk_commit() { emulation::bulk_commit(); }
template <int kPending>
void bulk_wait_read() {
  emulation::bulk_wait(kPending);
}
template <int kPending>
void bulk_wait() {
  emulation::bulk_wait(kPending);
}

// ---- Warpgroups

template <int kRegisters>
void registers_increase(Place place = emulation::here()) {
  emulation::set_max_registers(kRegisters, true, place);
}
template <int kRegisters>
void registers_decrease(Place place = emulation::here()) {
  emulation::set_max_registers(kRegisters, false, place);
}

enum class Swizzle : uint64_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

inline uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  emulation::check_descriptor(start, leading, stride);
  return static_cast<uint64_t>(swizzle) << 62 | static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 |
         static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 | (start >> 4 & 0x3fff);
}

inline void wgmma_fence(Place place = emulation::here()) { emulation::wgmma_fence(place); }
inline void wgmma_commit(Place place = emulation::here()) { emulation::wgmma_commit(place); }
template <int kPending>
void wgmma_wait(Place place = emulation::here()) {
  emulation::wgmma_wait(kPending, place);
}

template <class T>
float number_of(uint16_t bits) {
  return unpack<T>(bits, 0);
}

template <class T, int N, bool kTransposedA = false, bool kTransposedB = false>
void wgmma(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool accumulate, Place place = emulation::here()) {
  emulation::wgmma({&c[0][0], nullptr, N, accumulate, kTransposedA, kTransposedB, a, b, number_of<T>}, place);
}
template <class T, int N, bool kTransposedB = false>
void wgmma(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate, Place place = emulation::here()) {
  emulation::wgmma({&c[0][0], const_cast<uint32_t*>(a), N, accumulate, false, kTransposedB, 0, b, number_of<T>}, place);
}

}  // namespace torchweld::cuda::ptx
