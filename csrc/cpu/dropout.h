// Philox on vectors: the words of W neighbouring columns of a row of a dropout mask (philox.h).
#pragma once

#include "cpu/vec.h"
#include "philox.h"

namespace torchweld::cpu {
namespace {

// W / 2 numbers of 32 bits, each the low half of a lane; what the high halves hold does not matter.
typedef uint64_t Wide __attribute__((vector_size(4 * W)));

TW_INLINE Wide multiply_low(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));  // the plain one warns in GCC 12
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

// A row of a mask, W columns at a time. Each lane counts for four neighbouring columns; pairs of words are put together
// to 64 bits, and these interleaved into the order of the columns.
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
    Wide c[2][4];  // two halves of W / 2 counters: what one waits for, the other fills
    for (int h = 0; h < 2; ++h) {
      for (int l = 0; l < W / 2; ++l) c[h][0][l] = static_cast<uint64_t>(batch * W + h * W / 2 + l);
      c[h][1] = Wide{} + static_cast<uint32_t>(row_);
      c[h][2] = Wide{} + (row_ >> 32);
      c[h][3] = Wide{};
    }
    uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < philox::kRounds; ++round, key0 += philox::kWeyl0, key1 += philox::kWeyl1)
      for (int h = 0; h < 2; ++h) {
        const Wide product0 = multiply_low(c[h][0], philox::kMultiplier0),
                   product1 = multiply_low(c[h][2], philox::kMultiplier1);
        c[h][0] = (product1 >> 32) ^ c[h][1] ^ static_cast<uint64_t>(key0);
        c[h][1] = product1;
        c[h][2] = (product0 >> 32) ^ c[h][3] ^ static_cast<uint64_t>(key1);
        c[h][3] = product0;
      }
    Wide low, high;
    for (int l = 0; l < W / 2; ++l) {
      low[l] = l / 2 + (l % 2) * W / 2;
      high[l] = low[l] + W / 4;
    }
    for (int h = 0; h < 2; ++h) {
      const Wide even = (c[h][0] & 0xffffffffu) | (c[h][1] << 32), odd = (c[h][2] & 0xffffffffu) | (c[h][3] << 32);
      const VecU words[2] = {(VecU)__builtin_shuffle(even, odd, low), (VecU)__builtin_shuffle(even, odd, high)};
      for (int w = 0; w < 2; ++w) store(factors_ + (2 * h + w) * W, words[w] < VecU{} + drop_ ? Vec{} : splat(scale_));
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
