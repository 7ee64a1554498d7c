// Replaces csrc/cuda/ptx.cuh: each of its instructions in C++, on top of the machine's collectives.
#pragma once

#include "cuda/common.cuh"
#include "machine.h"

namespace torchweld::cuda::ptx {

inline uint32_t shared_base() { return emulation::shared_address(shared_memory); }

template <class T>
T& shared(uint32_t address) {
  return *reinterpret_cast<T*>(emulation::shared_pointer(address));
}

inline uint32_t load_shared(uint32_t address) { return shared<uint32_t>(address); }
inline float4 load_shared_floats(uint32_t address) {
  emulation::check_read(emulation::shared_pointer(address), sizeof(float4), sizeof(float4));
  return shared<float4>(address);
}

// Checked explicitly: an ldmatrix may read it, and not every variant checks plain accesses.
template <class T>
void store_shared(uint32_t address, T value) {
  emulation::check_write(emulation::shared_pointer(address), sizeof(T), sizeof(T));
  shared<T>(address) = value;
}

// ---- Matrices

struct LoadLane {
  uint32_t words[4], address;
};

// element(rows, lane) is the word that a lane gets of a matrix of 8 rows.
template <class F>
void load_matrices(const char* name, uint32_t (&words)[4], uint32_t address, emulation::Place place, F&& element) {
  emulation::check_read(emulation::shared_pointer(address), 16, 16);
  LoadLane mine{{}, address};
  emulation::collective(
      name, 0xffffffffu, mine,
      [&](const emulation::Lanes<LoadLane>& lanes) {
        for (int m = 0; m < 4; ++m) {
          uint16_t rows[8][8];
          for (int r = 0; r < 8; ++r) std::memcpy(rows[r], emulation::shared_pointer(lanes[8 * m + r].address), 16);
          for (int l = 0; l < 32; ++l) lanes[l].words[m] = element(rows, l);
        }
      },
      place);
  std::memcpy(words, mine.words, sizeof(words));
}

inline void ldmatrix(uint32_t (&words)[4], uint32_t address, emulation::Place place = emulation::here()) {
  load_matrices("ldmatrix", words, address, place, [](const auto& rows, int l) -> uint32_t {
    return rows[l / 4][l % 4 * 2] | rows[l / 4][l % 4 * 2 + 1] << 16;
  });
}

inline void ldmatrix_transposed(uint32_t (&words)[4], uint32_t address, emulation::Place place = emulation::here()) {
  load_matrices("ldmatrix.trans", words, address, place, [](const auto& rows, int l) -> uint32_t {
    return rows[l % 4 * 2][l / 4] | rows[l % 4 * 2 + 1][l / 4] << 16;
  });
}

struct MultiplyLane {
  float c[4];
  uint32_t a[4], b[2];
};

// c += a @ b over the K columns of a. number(word, p) is number p of the K / 8 numbers in a word.
template <int K, class Number>
__attribute__((no_sanitize_thread)) void multiply_lanes(const emulation::Lanes<MultiplyLane>& lanes, Number&& number) {
  typedef double Row __attribute__((vector_size(64)));
  constexpr int kPerWord = K / 8;
  double a[16][K];
  Row b[K];
  for (int l = 0; l < 32; ++l)
    for (int w = 0; w < 4; ++w)
      for (int p = 0; p < kPerWord; ++p) {
        const int k = w / 2 * (K / 2) + l % 4 * kPerWord + p;
        a[l / 4 + w % 2 * 8][k] = number(lanes[l].a[w], p);
        if (w % 2 == 0) b[k][l / 4] = number(lanes[l].b[w / 2], p);
      }
  for (int r = 0; r < 16; ++r) {
    Row sum{};
    for (int k = 0; k < K; ++k) sum += a[r][k] * b[k];
    for (int column = 0; column < 8; ++column) {
      float& c = lanes[r % 8 * 4 + column / 2].c[r / 8 * 2 + column % 2];
      c = emulation::toward_zero(c + sum[column]);
    }
  }
}

template <int K, class Number>
void multiply(const char* name, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulation::Place place,
              Number&& number) {
  MultiplyLane mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::collective(
      name, 0xffffffffu, mine, [&](const emulation::Lanes<MultiplyLane>& lanes) { multiply_lanes<K>(lanes, number); },
      place);
  std::memcpy(c, mine.c, sizeof(c));
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, emulation::Place place = emulation::here()) {
  multiply<16>("mma.m16n8k16", c, a, b0, b1, place, [](uint32_t word, int half) { return unpack<T>(word, half); });
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulation::Place place = emulation::here()) {
  multiply<8>("mma.m16n8k8.tf32", c, a, b0, b1, place,
              [](uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

// ---- Copies and numbers

template <int kBytes>
void cp_async(uint32_t to, const void* from, int bytes) {
  if (bytes < 0 || bytes > kBytes) emulation::fail("cp.async of %d bytes out of %d", bytes, kBytes);
  emulation::copy_async(emulation::shared_pointer(to), from, kBytes, bytes);
}
inline void cp_async(uint32_t to, const void* from) { cp_async<16>(to, from, 16); }

inline void cp_async_commit() { emulation::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulation::wait_for_copies(kPending);
}

inline void add_pair(float* to, float x, float y) {
  atomicAdd(to, x);
  atomicAdd(to + 1, y);
}

template <class T>
T opaque(T x) {
  return x;
}

inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
// "rcp.approx.ftz", "ex2.approx.ftz"
inline float reciprocal(float x) { return flushed(emulation::approximate(x, 1 / double{flushed(x)}, 1)); }
inline float exp2(float x) { return flushed(emulation::approximate(x, std::exp2(double{flushed(x)}), 2)); }

[[noreturn]] inline void refuse(const char* expected, const char* kernel) {
  emulation::fail("%s: expected %s", kernel, expected);
}

}  // namespace torchweld::cuda::ptx
