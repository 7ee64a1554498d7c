// Blocks of a matrix product in the vector units.
//
// The micro-kernel keeps kRows x kVectors accumulators in registers, broadcasts a word of A to a vector and multiplies
// it with kVectors vectors of B: two FLOPs (bf16: four) per lane and step. A is read with any two strides, so no
// product of the backward needs a transposed copy. Goto, van de Geijn: Anatomy of High-Performance Matrix
// Multiplication, ACM TOMS 34(3), 2008.
#pragma once

#include "cpu/matmul/operands.h"

namespace torchweld::cpu {
namespace {

// As an integer, so that no addition of 0.0f remains and a pair of bf16 keeps its bits.
TW_INLINE Vec broadcast_word(const float* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return from_bits(VecU{} + word);
}

template <class Compute, int N>
TW_INLINE void multiply(int64_t steps, const float* const (&a)[kRows], int64_t a_step, const float* b, int64_t b_step,
                        Vec (&acc)[kRows][N]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < N; ++v) acc[r][v] = Vec{};
  int64_t offset = 0;
  for (int64_t k = 0; k < steps; ++k, offset += a_step, b += b_step) {
    Vec right[N];
    for (int v = 0; v < N; ++v) right[v] = load(b + v * W);
    for (int r = 0; r < kRows; ++r) {
      const Vec left = broadcast_word(a[r] + offset);
      for (int v = 0; v < N; ++v) acc[r][v] = Compute::dot(left, right[v], acc[r][v]);
    }
  }
}

// A block of at most kRows rows and exactly N vectors. The last row stands for rows past the end.
template <class Compute, int N, bool kAccumulate>
void multiply_block(int64_t rows, Span steps, const Left& a, const float* b, int64_t b_step, float* c, int64_t ldc) {
  const int64_t chain = rows < kRows || N == 1 ? Compute::narrow_chain : Compute::chain;
  bool add = kAccumulate;
  for (int64_t k = steps.begin; k < steps.end || !add; k += chain, add = true) {  // no steps: zeros are stored
    const float* left[kRows];
    for (int r = 0; r < kRows; ++r) left[r] = a.data + (r < rows ? r : rows - 1) * a.row + k * a.step;
    Vec acc[kRows][N];
    multiply<Compute, N>(min_of(chain, steps.end - k), left, a.step, b + k * b_step, b_step, acc);
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      for (int v = 0; v < N; ++v) {
        float* out = c + r * ldc + v * W;
        store(out, add ? load(out) + acc[r][v] : acc[r][v]);
      }
    }
  }
}

template <class Compute, bool kAccumulate>
void multiply_vectors(int64_t vectors, int64_t rows, Span steps, const Left& a, const float* b, int64_t b_step,
                      float* c, int64_t ldc) {
  static_assert(kVectors == 2 || kVectors == 4, "the cases below");
  switch (vectors) {
    case 1:
      return multiply_block<Compute, 1, kAccumulate>(rows, steps, a, b, b_step, c, ldc);
    case 2:
      return multiply_block<Compute, 2, kAccumulate>(rows, steps, a, b, b_step, c, ldc);
    case 3:
      return multiply_block<Compute, (kVectors > 2 ? 3 : 2), kAccumulate>(rows, steps, a, b, b_step, c, ldc);
    case 4:
      return multiply_block<Compute, kVectors, kAccumulate>(rows, steps, a, b, b_step, c, ldc);
  }
}

}  // namespace
}  // namespace torchweld::cpu
