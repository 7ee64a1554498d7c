// The key side of a tile of the attention backward: keys and values as the operands of scores, dP and dquery.
#pragma once

#include "cpu/attention/shared_keys.h"

namespace torchweld::cpu {
namespace {

template <class T, class Compute>
struct GradientKeys {
  using Shared = SharedKeys<T, Compute>;

  Transposed<Compute> key, value;
  Right steps;  // keys, summed over

  static int64_t words(const AttentionInputs& p, int64_t tile_keys) {
    return tile_keys * (words_of<Compute>(p.dim) + words_of<Compute>(p.value_dim)) +
           words_of<Compute>(tile_keys) * round_up(p.dim, W) + Shared::copy_words(p, tile_keys);
  }

  // Keys [j0, j0 + keys) of key head (b, hk). memory: words(p, tile_keys); shared: see SharedKeys.
  GradientKeys(const AttentionInputs& p, int64_t b, int64_t hk, int64_t j0, int64_t keys, int64_t tile_keys,
               float* memory, const float* shared) {
    auto take = [&](int64_t words) {
      memory += words;
      return memory - words;
    };
    const T* k = head_of<T>(p.key, p.key_strides, b, hk) + j0 * p.key_strides.row;
    const T* v = head_of<T>(p.value, p.value_strides, b, hk) + j0 * p.value_strides.row;
    // Blocks reach past the keys that queries see: what no query sees may be NaN, and zeros stand for it.
    const int64_t seen = max_of(min_of(keys, Band(p).high(p.queries - 1) - j0), 0);
    const bool in_place = reads_in_place<T, Compute>(p);
    auto transposed = [&](const T* rows, int64_t stride, int64_t dim) -> Transposed<Compute> {
      float* packed = take(tile_keys * words_of<Compute>(dim));
      if (in_place) return Transposed<Compute>::in_place(rows, stride, seen);
      pack_transposed<T, Compute>(rows, stride, seen, dim, packed);
      return Transposed<Compute>::packed(packed, words_of<Compute>(dim));
    };
    key = transposed(k, p.key_strides.row, p.dim);
    value = transposed(v, p.value_strides.row, p.value_dim);
    float* packed = take(words_of<Compute>(tile_keys) * round_up(p.dim, W));
    float* copies = take(Shared::copy_words(p, tile_keys));
    if (right_in_place<T, Compute>(p.dim)) {
      steps = {reinterpret_cast<const float*>(k), p.key_strides.row, kPanel};
      return;
    }
    const int64_t panel = Compute::tiles ? Compute::panel * words_of<Compute>(keys) : kPanel;
    int64_t stride = p.key_strides.row;
    Shared::subtract(shared, k, stride, seen, p.dim, copies);
    pack_rows<T, Compute>(k, stride, seen, p.dim, packed, panel);
    steps = {packed, Compute::tiles ? Compute::panel : round_up(p.dim, W), panel};
  }
};

}  // namespace
}  // namespace torchweld::cpu
