// Dropout of the softmax of one head. Its sums know nothing of the mask: what is dropped of P becomes zero on the way
// to the product with the values, and the output is scaled once, where it is stored. The backward makes the mask again.
#pragma once

#include "cpu/matmul/matmul.h"
#include "cpu/simd/dropout.h"
#include "params/attention.h"

namespace torchweld::cpu {
namespace {

class HeadDropout {
 public:
  HeadDropout(const AttentionInputs& p, int64_t b, int64_t h) : dropout_(p.dropout), first_row_(p.mask_row(b, h)) {}

  bool active() const { return dropout_.seed != nullptr; }

  // Of what is kept.
  float scale() const { return active() ? dropout_.scale : 1.0f; }

  // What P is multiplied by, in the row of query i and columns [span.begin, span.end) of a tile that starts at key
  // `key`; all of them multiples of W.
  __attribute__((noinline)) void factors(float* out, int64_t i, int64_t key, Span span) const {
    MaskRow mask(dropout_, static_cast<uint64_t>(first_row_ + i));
    for (int64_t j = span.begin; j < span.end; j += W) store(out + j, mask.factors(key + j));
  }

  // Zeroes what is dropped of a row that Compute::store_row has stored.
  template <class Compute>
  __attribute__((noinline)) void drop(float* row, int64_t i, int64_t key, Span span) const {
    MaskRow mask(dropout_, static_cast<uint64_t>(first_row_ + i));
    for (int64_t j = span.begin; j < span.end; j += W) {
      const VecI kept = mask.factors(key + j) != zero();
      if constexpr (Compute::per_word == 1) {
        store(row + j, from_bits(bits(load(row + j)) & (VecU)kept));
      } else {
        for (int part = 0; part < Compute::parts; ++part) {
          auto* p = reinterpret_cast<uint16_t*>(row) + Compute::element(j) + part * 2 * TileLayout<1>::block;
          store_bits(p, load_bits(p, All{}) & narrow((VecU)kept >> 16), All{});
        }
      }
    }
  }

 private:
  const Dropout dropout_;
  const int64_t first_row_;
};

}  // namespace
}  // namespace torchweld::cpu
