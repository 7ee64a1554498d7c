// Dropout on vectors: the factors of W neighbouring columns of a row (philox.h).
#pragma once

#include "cpu/simd/random.h"

namespace torchweld::cpu {
namespace {

// A row of a mask, W columns at a time. Random words are made for 4 * W neighbours.
class MaskRow {
 public:
  TW_INLINE MaskRow(const Dropout& dropout, uint64_t row)
      : seed_(static_cast<uint64_t>(*dropout.seed)),
        row_(row),
        drop_(dropout.drop),
        scale_(dropout.scale),
        first_(dropout.first_column) {}

  // The factors of columns [col, col + W): 0 or the scale. col is a multiple of W.
  TW_INLINE Vec factors(int64_t col) {
    col += first_;
    const int64_t batch = col / (4 * W);
    if (batch != batch_) fill(batch);
    return load(factors_ + col % (4 * W));
  }

 private:
  __attribute__((noinline)) void fill(int64_t batch) {
    batch_ = batch;
    uint32_t words[4 * W];
    philox_words(seed_, row_, batch, words);
    for (int w = 0; w < 4; ++w) {
      VecU word;
      std::memcpy(&word, words + w * W, sizeof word);
      store(factors_ + w * W, word < VecU{} + drop_ ? Vec{} : splat(scale_));
    }
  }

  const uint64_t seed_, row_;
  const uint32_t drop_;
  const float scale_;
  const int64_t first_;
  int64_t batch_ = -1;
  alignas(64) float factors_[4 * W];
};

}  // namespace
}  // namespace torchweld::cpu
