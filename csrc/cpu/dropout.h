// Philox on vectors: the words of W neighbouring columns of a row of a dropout mask (philox.h).
#pragma once

#include "cpu/vec.h"
#include "philox.h"

namespace torchweld::cpu {
namespace {

// The 32-bit products of lanes, high and low halves. In 64 bits each, which every instruction set has.
TW_INLINE void multiply_wide(VecU a, uint32_t b, VecU& high, VecU& low) {
  typedef uint64_t Wide __attribute__((vector_size(W * sizeof(uint64_t))));
  const Wide product = __builtin_convertvector(a, Wide) * static_cast<uint64_t>(b);
  low = __builtin_convertvector(product, VecU);
  high = __builtin_convertvector(product >> 32, VecU);
}

// A row of a mask, W columns at a time. Lane l of a batch counts for columns 4 * l to 4 * l + 3 of 4 * W neighbours;
// the four vectors of words are then interleaved into the order of the columns.
class MaskRow {
 public:
  TW_INLINE MaskRow(const Dropout& dropout, uint64_t row)
      : seed_(static_cast<uint64_t>(*dropout.seed)), row_(row), drop_(dropout.drop), scale_(dropout.scale) {}

  // What a value at columns [col, col + W) is multiplied by: 0 or the scale. col is a multiple of W.
  TW_INLINE Vec factors(int64_t col) {
    const int64_t batch = col / (4 * W);
    if (batch != batch_) fill(batch);
    return load(factors_ + col % (4 * W));
  }

 private:
  __attribute__((noinline)) void fill(int64_t batch) {
    batch_ = batch;
    VecU c0, c1, c2, c3{};
    for (int l = 0; l < W; ++l) c0[l] = static_cast<uint32_t>(batch * W + l);
    c1 = VecU{} + static_cast<uint32_t>(row_);
    c2 = VecU{} + static_cast<uint32_t>(row_ >> 32);
    uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < philox::kRounds; ++round, key0 += philox::kWeyl0, key1 += philox::kWeyl1) {
      VecU high0, low0, high1, low1;
      multiply_wide(c0, philox::kMultiplier0, high0, low0);
      multiply_wide(c2, philox::kMultiplier1, high1, low1);
      c0 = high1 ^ c1 ^ key0;
      c1 = low1;
      c2 = high0 ^ c3 ^ key1;
      c3 = low0;
    }
    const VecU words[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) {
      const Vec kept = words[w] < VecU{} + drop_ ? Vec{} : splat(scale_);
      for (int l = 0; l < W; ++l) factors_[4 * l + w] = kept[l];
    }
  }

  const uint64_t seed_, row_;
  const uint32_t drop_;
  const float scale_;
  int64_t batch_ = -1;
  alignas(64) float factors_[4 * W];
};

}  // namespace
}  // namespace torchweld::cpu
