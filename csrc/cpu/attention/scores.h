// What the forward and both backward kernels of attention share: where a head lies in memory, which keys a query sees,
// and how a row of products query @ key^T becomes a row of scores.
#pragma once

#include "cpu/attention/dropout.h"
#include "cpu/matmul/transposed.h"
#include "cpu/parallel.h"
#include "cpu/simd/exp.h"

namespace torchweld::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();

template <class T>
const T* head_of(const void* base, const Strides& s, int64_t b, int64_t h) {
  return static_cast<const T*>(base) + b * s.batch + h * s.head;
}
template <class T>
T* head_of(void* base, const Strides& s, int64_t b, int64_t h) {
  return static_cast<T*>(base) + b * s.batch + h * s.head;
}

// Query i sees keys [low(i), high(i)); both grow with i. Empty where high <= low.
struct Band {
  int64_t left, right, shift, keys, queries;
  bool part;

  explicit Band(const AttentionInputs& p)
      : left(p.left), right(p.right), shift(p.shift()), keys(p.keys), queries(p.queries), part(p.part) {}

  int64_t low(int64_t i) const { return min_of(max_of(i + shift - left, 0), keys); }
  int64_t high(int64_t i) const { return min_of(max_of(i + shift + right + 1, 0), keys); }
  // Whether what query i sees, if anything, lies in one tile of so many keys.
  bool in_one_tile(int64_t i, int64_t tile) const {
    if (part) return false;
    return keys <= tile || low(i) >= high(i) || low(i) / tile == (high(i) - 1) / tile;
  }
  // Keys [begin, end) are seen by queries [first(begin), last(end)) and by no others.
  int64_t first(int64_t begin) const { return min_of(max_of(begin - shift - right, 0), queries); }
  int64_t last(int64_t end) const { return min_of(max_of(end - shift + left, 0), queries); }
};

// Whether products stay as they are, and scale goes with the exponential. Then it must not be 0 or inf in units of
// log2.
inline bool plain(const AttentionInputs& p) {
  return p.scale > 1e-30f && p.scale < 1e30f && p.softcap == 0 && p.bias_type == MaskType::none &&
         p.alibi_slopes == nullptr;
}

// A score is this times what Scores::finish leaves in the row.
inline float score_unit(const AttentionInputs& p) { return plain(p) ? p.scale : 1.0f; }

// Whether keys and values are read where they lie for scores and dP. Forward and backward agree on it, for the backward
// makes the forward's products again.
template <class T, class Compute>
inline bool reads_in_place(const AttentionInputs& p) {
  const int64_t rows = p.heads / max_of(p.kv_heads, 1) * p.queries;
  return transposed_in_place<T, Compute>(rows, p.key_strides.row, p.dim) &&
         transposed_in_place<T, Compute>(rows, p.value_strides.row, p.value_dim);
}

// Whether the softmax is to be as exact as float32, whatever words P is kept in: a gradient may be in float32 beside
// operands in 16 bits, or weigh keys by their distance. Forward and backward agree on it.
inline bool exact_softmax(const AttentionInputs& p) {
  return p.bias_type == MaskType::float32 || p.alibi_slopes != nullptr || p.sinks != nullptr;
}

// The degree of exp2's polynomial where the softmax is exact.
template <class Compute>
constexpr int kExactDegree = max_of(Compute::exp_degree, 5);

// exp(score - max), from what finish() leaves of both, and unit() of Scores. The difference comes first: it is exact
// where it counts, and 0 at the maximum however large that is. From a product with the unit, a rounding of the maximum
// would be one of the exponent.
template <int kDegree>
TW_INLINE Vec weight(Vec score, Vec max, Vec unit) {
  return exp2<kDegree>((score - max) * unit);
}

// How far maxima are above a sink. A function of its own, so that forward and backward round alike: what the compiler
// contracts depends on what else becomes of a product.
inline __attribute__((noinline)) Vec above_sink(Vec max, float score_unit, float sink) {
  return max * score_unit - sink;
}

// Of W rows: what P @ value is to be multiplied by, and the logarithm of the softmax's denominator.
struct Denominator {
  Vec inverse, lse;

  // From the maxima, as above, and the sums of weights. A sink (nullptr: none) is one more score.
  TW_INLINE Denominator(Vec max, Vec total, float score_unit, const float* sink) {
    const bool sinks = sink != nullptr && *sink != -kInfinity;
    Vec factor = splat(1.0f);
    VecI below{};  // the sink
    if (sinks) {
      const Vec distance = above_sink(max, score_unit, *sink);
      below = distance < 0.0f;
      const Vec smaller = exp_of_negative(below ? distance : -distance);
      factor = below ? smaller : factor;
      total = below ? total * smaller + (1.0f + (*sink - *sink)) : total + smaller;  // NaN where the sink is inf
    }
    const Vec logarithm = vlog(total);
    inverse = total == zero() ? zero() : factor / total;
    lse = total == zero() ? splat(-kInfinity) : max * score_unit + logarithm;
    if (sinks) lse = below ? *sink + logarithm : lse;
  }
};

// The scores of one head, a row of a tile at a time.
class Scores {
 public:
  Scores(const AttentionInputs& p, int64_t b, int64_t h)
      : p_(p),
        band(p),
        dropout(p, b, h),
        bias_(p.bias_type == MaskType::none ? 0 : b * p.bias_strides.batch + h * p.bias_strides.head),
        slope_(p.alibi_slopes != nullptr ? p.alibi_slopes[b * p.alibi_batch_stride + h] : 0.0f),
        plain_(plain(p)) {}

  // exp(score) is exp2(unit() * what finish() leaves in the row).
  float unit() const { return score_unit(p_) * kLog2e; }

  // Whether finish() would leave everything as it is, for queries [i, last) and keys [key, end).
  bool bare(int64_t i, int64_t last, int64_t key, int64_t end) const {
    return plain_ && band.low(last - 1) <= key && end <= band.high(i);
  }

  // Columns [span.begin, span.end), multiples of W, of the row that query i has in the tile which starts at key `key`:
  // from products to scores, -inf where i does not see the key. slopes: the softcap's derivative goes there, unless
  // nullptr.
  TW_INLINE void finish(float* row, int64_t i, int64_t key, Span span, float* slopes) const {
    if (!plain_ && p_.keys > 0) modify(row, i, key, span, slopes);  // of no keys there is no bias to read
    const int64_t low = band.low(i) - key, high = band.high(i) - key;
    if (low > span.begin) blank(row, span.begin, min_of(low, span.end));
    if (high < span.end) blank(row, max_of(high, span.begin), span.end);
  }

  // Of keys [key, key + W) from where query i stands.
  TW_INLINE Vec distance(int64_t i, int64_t key) const {
    Vec v;
    for (int l = 0; l < W; ++l) v[l] = static_cast<float>(l + key - i - band.shift);
    return v;
  }

 private:
  TW_INLINE static void blank(float* row, int64_t begin, int64_t end) {
    VecI lane;
    for (int l = 0; l < W; ++l) lane[l] = l;
    for (int64_t j = round_down(begin, W); j < end; j += W) {
      const VecI column = lane + static_cast<int32_t>(j);
      const VecI blanked = (column >= static_cast<int32_t>(begin)) & (column < static_cast<int32_t>(end));
      store(row + j, blanked ? splat(-kInfinity) : load(row + j));
    }
  }

  // Each pass over the row is paid for, so `factor`, what is still to be multiplied by, goes with the next one.
  __attribute__((noinline)) void modify(float* row, int64_t i, int64_t key, Span span, float* slopes) const {
    float factor = p_.scale;
    if (p_.softcap != 0) {
      const float inverse = 1.0f / p_.softcap;
      for (int64_t j = span.begin; j < span.end; j += W) {
        const Vec x = load(row + j) * factor * inverse;
        store(row + j, vtanh(x) * p_.softcap);
        if (slopes == nullptr) continue;
        // Of 1 - tanh^2 nothing but roundings is left where tanh is near 1.
        const Vec e = exp2<5>(from_bits(bits(x) & 0x7fffffffu) * (-2.0f * kLog2e));
        store(slopes + j, 4.0f * e / ((1.0f + e) * (1.0f + e)));
      }
      factor = 1.0f;
    }
    switch (p_.bias_type) {
      case MaskType::none:
        break;
      case MaskType::boolean:
        mask(row, i, key, span, factor);
        break;
      case MaskType::float32:
        add_bias<float>(row, i, key, span, factor);
        break;
      case MaskType::bfloat16:
        add_bias<bf16>(row, i, key, span, factor);
        break;
      case MaskType::float16:
        add_bias<f16>(row, i, key, span, factor);
        break;
    }
    if (p_.bias_type != MaskType::none) factor = 1.0f;
    if (p_.alibi_slopes != nullptr) {
      Vec distance = this->distance(i, key + span.begin);
      for (int64_t j = span.begin; j < span.end; j += W, distance += static_cast<float>(W))
        store(row + j, load(row + j) * factor - from_bits(bits(distance) & 0x7fffffffu) * slope_);
    } else if (factor != 1.0f) {
      for (int64_t j = span.begin; j < span.end; j += W) store(row + j, load(row + j) * factor);
    }
  }

  template <class T>
  const T* bias_row(int64_t i) const {
    return static_cast<const T*>(p_.bias) + bias_ + i * p_.bias_strides.row;
  }

  // The last vector may reach past the last key: what is there must not be read.
  template <class Body>
  TW_INLINE void for_keys(int64_t key, Span span, Body&& body) const {
    const int64_t end = min_of(span.end, p_.keys - key);
    for_each_vector(end - span.begin,
                    [&](int64_t j, auto lanes) __attribute__((always_inline)) { body(span.begin + j, lanes); });
  }

  template <class T>
  TW_INLINE void add_bias(float* row, int64_t i, int64_t key, Span span, float factor) const {
    const T* bias = bias_row<T>(i);
    if (p_.bias_step == 0) {
      T repeated[W];
      for (int l = 0; l < W; ++l) repeated[l] = *bias;
      const Vec value = load(repeated);
      for (int64_t j = span.begin; j < span.end; j += W) store(row + j, load(row + j) * factor + value);
    } else {
      for_keys(key, span, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        __builtin_prefetch(bias + 12 * p_.bias_strides.row + key + j);
        store(row + j, load(row + j) * factor + load(bias + key + j, lanes));
      });
    }
  }

  TW_INLINE void mask(float* row, int64_t i, int64_t key, Span span, float factor) const {
    const uint8_t* attend = bias_row<uint8_t>(i);
    if (p_.bias_step == 0) {
      const bool seen = *attend != 0;
      for (int64_t j = span.begin; j < span.end; j += W)
        store(row + j, seen ? load(row + j) * factor : splat(-kInfinity));
    } else {
      for_keys(key, span, [&](int64_t j, auto lanes) __attribute__((always_inline)) {
        store(row + j, load_bytes(attend + key + j, lanes) != 0u ? load(row + j) * factor : splat(-kInfinity));
      });
    }
  }

  const AttentionInputs& p_;

 public:
  const Band band;
  const HeadDropout dropout;

 private:
  const int64_t bias_;
  const float slope_;
  const bool plain_;
};

}  // namespace
}  // namespace torchweld::cpu
