// Stands in for csrc/cuda/ptx.cuh: each of its instructions in C++, on what the lanes of a warp bring together.
#pragma once

#include "cuda/common.cuh"
#include "machine.h"

namespace torchweld::cuda::ptx {

inline uint32_t shared_base() { return 0; }

template <class T>
T* shared(uint32_t address, uint32_t alignment = sizeof(T)) {
  if (address % alignment != 0) emulation::fail("misaligned address in shared memory");
  return reinterpret_cast<T*>(reinterpret_cast<char*>(shared_memory) + address);
}

inline uint32_t load_shared(uint32_t address) { return *shared<uint32_t>(address); }
inline void store_shared(uint32_t address, uint32_t word) { *shared<uint32_t>(address) = word; }
inline void store_shared(uint32_t address, uint16_t half) { *shared<uint16_t>(address) = half; }

inline int lane() { return static_cast<int>(threadIdx.x + blockDim.x * threadIdx.y) % 32; }

inline void ldmatrix(uint32_t (&words)[4], uint32_t address) {
  const uint32_t* rows = emulation::of_all_lanes("ldmatrix", address);
  for (int m = 0; m < 4; ++m) words[m] = shared<uint32_t>(rows[8 * m + lane() / 4], 16)[lane() % 4];
}

inline void ldmatrix_transposed(uint32_t (&words)[4], uint32_t address) {
  const uint32_t* rows = emulation::of_all_lanes("ldmatrix.trans", address);
  auto element = [&](int m, int row) -> uint32_t { return shared<uint16_t>(rows[8 * m + row], 16)[lane() / 4]; };
  for (int m = 0; m < 4; ++m) words[m] = element(m, lane() % 4 * 2) | element(m, lane() % 4 * 2 + 1) << 16;
}

struct Operands {
  uint32_t a[4], b[2];
};

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Operands* all = emulation::of_all_lanes("mma", Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int g = lane() / 4, t = lane() % 4;
  for (int e = 0; e < 4; ++e) {
    double sum = c[e];
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2, half = k % 2;
      sum += static_cast<double>(unpack<T>(all[4 * g + owner].a[k / 8 * 2 + e / 2], half)) *
             unpack<T>(all[4 * (2 * t + e % 2) + owner].b[k / 8], half);
    }
    c[e] = static_cast<float>(sum);
  }
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Operands* all = emulation::of_all_lanes("mma.tf32", Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  auto number = [](uint32_t bits) { return static_cast<double>(__uint_as_float(bits & 0xffffe000u)); };
  const int g = lane() / 4, t = lane() % 4;
  for (int e = 0; e < 4; ++e) {
    double sum = c[e];
    for (int k = 0; k < 8; ++k)
      sum += number(all[4 * g + k % 4].a[k / 4 * 2 + e / 2]) * number(all[4 * (2 * t + e % 2) + k % 4].b[k / 4]);
    c[e] = static_cast<float>(sum);
  }
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

template <int kBytes>
void cp_async(uint32_t to, const void* from, int bytes) {
  if (bytes < 0 || bytes > kBytes) emulation::fail("cp.async of more bytes than it moves");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % kBytes != 0) emulation::fail("misaligned address of cp.async");
  char* target = shared<char>(to, kBytes);
  if (bytes > 0) std::memcpy(target, from, bytes);
  std::memset(target + bytes, 0, kBytes - bytes);
}
inline void cp_async_commit() {}
template <int kPending>
void cp_async_wait() {}

inline float exp2(float x) { return std::exp2(x); }

}  // namespace torchweld::cuda::ptx
