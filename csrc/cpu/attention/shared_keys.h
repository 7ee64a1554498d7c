// What the keys of a head have in common, kept out of the product that makes dquery where dscores are rounded to bf16.
//
//   dquery = scale * dscores @ key = scale * (dscores @ (key - shared) + rowsum(dscores) * shared)
//
// The dscores of a row sum to dlse, but not once they are rounded: a common part of the keys would reach dquery as that
// rounding times its size. `shared` is, by column, the key next to zero where all keys have one sign, else zero. So no
// key gets larger without it, however far from the others some are.
#pragma once

#include "cpu/attention/queries.h"

namespace torchweld::cpu {
namespace {

template <class T, class Compute>
class SharedKeys {
 public:
  static constexpr bool kUsed = Compute::per_word == 2 && Compute::parts == 1;

  // memory: [B * Hkv, width], `words(p)` floats.
  SharedKeys(const AttentionBackwardParams& p, float* memory) : p_(p), width_(round_up(p.dim, W)), memory_(memory) {}

  static int64_t words(const AttentionBackwardParams& p) {
    return kUsed ? p.batch * p.kv_heads * round_up(p.dim, W) : 0;
  }

  void find(int64_t kv_head) const {
    const int64_t seen = min_of(max_of(Band(p_).high(p_.queries - 1), 0), p_.keys), row = p_.key_strides.row;
    const T* key = head_of<T>(p_.key, p_.key_strides, kv_head / p_.kv_heads, kv_head % p_.kv_heads);
    float* out = memory_ + kv_head * width_;
    for (int64_t d = 0; d < width_; d += W) store(out + d, zero());
    // A sink has a part of its own in the sum of a row, as keys elsewhere have, and a softcap a slope for each score.
    if (p_.part || p_.softcap != 0 || p_.sinks != nullptr || seen == 0) return;
    for_each_vector(p_.dim, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
      Vec low = load(key + d, lanes), high = low;
      for (int64_t j = 1; j < seen; ++j) {
        const Vec k = load(key + j * row + d, lanes);
        low = k < low ? k : low;
        high = k > high ? k : high;
      }
      const Vec most = splat(3e38f);
      store(out + d, low > zero() && low < most ? low : high < zero() && high > -most ? high : zero(), lanes);
    });
  }

  // [width], nullptr where the keys of this head share nothing.
  const float* of(int64_t kv_head) const {
    if constexpr (!kUsed) return nullptr;
    const float* found = memory_ + kv_head * width_;
    for (int64_t d = 0; d < p_.dim; ++d)
      if (found[d] != 0) return found;
    return nullptr;
  }

  // Takes what keys share out of so many rows of them: `key` then points to copies in `to`, copy_words(p, rows) long.
  static void subtract(const float* shared, const T*& key, int64_t& stride, int64_t rows, int64_t dim, float* to) {
    if (!kUsed || shared == nullptr) return;
    T* copies = reinterpret_cast<T*>(to);
    for (int64_t j = 0; j < rows; ++j)
      for_each_vector(dim, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
        store(copies + j * dim + d, load(key + j * stride + d, lanes) - load(shared + d, lanes), lanes);
      });
    key = copies;
    stride = dim;
  }
  static int64_t copy_words(const AttentionInputs& p, int64_t rows) {
    return kUsed ? round_up(ceil_div(rows * p.dim, 2), W) : 0;
  }

 private:
  const AttentionBackwardParams& p_;
  const int64_t width_;
  float* const memory_;
};

}  // namespace
}  // namespace torchweld::cpu
