// What linear_cross_entropy does with a block of logits: some rows, and a part of the classes.
//
// Forward it leaves of each row the block's largest logit and the sum of exp(logit - largest), and in the place of the
// logits these weights, so that the gradient needs no second exp. Under a softcap, whose slope asks for them, the
// logits themselves are left.
#pragma once

#include "cpu/matmul/pack.h"
#include "cpu/simd/exp.h"

namespace torchweld::cpu {
namespace {

// What weights of elements of T are kept in: no wider than what their products read.
template <class T>
struct Kept {
  using type = float;
};
template <>
struct Kept<bf16> {
  using type = bf16;
};

// Of a row and a block of classes.
struct BlockStatistics {
  float max, sum;
  float mean;  // its part of the mean of logit - max over all classes; only under label smoothing
};

// Of a row, with share = factor * weight: dlogits = share - others + share * extra, at the target with own for others.
// The z-loss is apart: of a target with all the probability, share - own is far smaller than either.
struct RowGradient {
  float max, factor;  // of all classes; the factor lacks exp(max of the block - max)
  float others, own;
  float extra;
};

TW_INLINE void store_weight(float* p, Vec v, All) { store(p, v); }
TW_INLINE void store_weight(float* p, Vec v, First lanes) { store(p, v, lanes); }
template <class Lanes>
TW_INLINE void store_weight(bf16* p, Vec v, Lanes lanes) {
#if defined(__AVX512BF16__)
  store_bits(p, (VecH)_mm512_cvtneps_pbh((__m512)v), lanes);  // subnormal weights may become zeros
#else
  store(p, v, lanes);
#endif
}

// Logits of one row, in place: the bias and the softcap.
TW_INLINE void finish_logits(float* logits, int64_t count, const float* bias, float softcap) {
  if (bias == nullptr && softcap == 0.0f) return;
  const float inverse = 1.0f / softcap;
  for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    Vec z = load(logits + i, lanes);
    if (bias != nullptr) z = z + load(bias + i, lanes);
    if (softcap != 0.0f) z = vtanh(z * inverse) * softcap;
    store(logits + i, z, lanes);
  });
}

// `weights`: null where no gradient is wanted. `share`: 1 / classes under label smoothing, else 0.
template <class S>
TW_INLINE BlockStatistics weigh(const float* logits, int64_t count, bool keep_logits, float share, S* weights) {
  // A NaN need not win here: the sum meets it.
  Vec largest = splat(-__builtin_inff());
  for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    largest = vmax(keep(load(logits + i, lanes), lanes, -__builtin_inff()), largest);
  });
  BlockStatistics found{max_of(largest), 0.0f, 0.0f};
  const float base = found.max == -__builtin_inff() ? 0.0f : found.max;
  auto weight = [&](int64_t i, auto lanes)
                    __attribute__((always_inline)) { return exp2<6>((load(logits + i, lanes) - base) * kLog2e); };
  if (weights == nullptr || keep_logits)
    found.sum = sum_over(count, weight);
  else
    found.sum = sum_over(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec w = weight(i, lanes);
      store_weight(weights + i, w, lanes);
      return w;
    });
  if (share > 0.0f)
    found.mean = sum_over(count, [&](int64_t i, auto lanes) { return (load(logits + i, lanes) - base) * share; });
  if (weights != nullptr && keep_logits)
    for_each_vector(count, [&](int64_t i, auto lanes) { store_weight(weights + i, load(logits + i, lanes), lanes); });
  return found;
}

// dlogits of a row in the place of its weights, or of its logits under a softcap. `target`: counted from the block's
// first class.
template <class S>
TW_INLINE void differentiate(S* weights, int64_t count, int64_t target, const RowGradient& row, float block_max,
                             float softcap) {
  const float inverse = softcap != 0.0f ? 1.0f / softcap : 0.0f;
  const float factor = softcap != 0.0f ? row.factor : row.factor * exp2<6>(splat((block_max - row.max) * kLog2e))[0];
  for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec kept = load(weights + i, lanes);
    const Vec share = (softcap != 0.0f ? exp2<6>((kept - row.max) * kLog2e) : kept) * factor;
    Vec d = share - row.others;
    if (static_cast<uint64_t>(target - i) < static_cast<uint64_t>(W)) d[target - i] = share[target - i] - row.own;
    d = d + share * row.extra;
    // 1 - (kept / softcap)^2, from differences that are exact where it is small.
    if (softcap != 0.0f) d = d * ((softcap - kept) * inverse * ((softcap + kept) * inverse));
    store_weight(weights + i, d, lanes);
  });
}

}  // namespace
}  // namespace torchweld::cpu
