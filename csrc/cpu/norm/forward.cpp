// Layer norm and RMS norm forward, with or without a residual add in front.
//
//   s = input, or residual + dropout(input)      xhat = (s - mean) * rstd      output = xhat * weight + bias
//
// RMS norm is the same with mean = 0. weight stands for weight + weight_offset.
//
// A thread owns whole rows; a row stays in cache, as floats up to kBufferedColumns, between the passes for mean,
// variance (about that mean, so no cancellation) and output. Where the mean is far above the deviation, one more pass
// sums what it is off by (the corrected two-pass algorithm). Memory is read and
// written once: 2 values per element, 4 with a residual. Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450.
// Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv:1910.07467. Chan, Golub, LeVeque: Algorithms for
// Computing the Sample Variance.

#include <type_traits>

#include "cpu/norm/layer_norm.h"
#include "moments.h"

namespace torchweld::cpu {
namespace {

constexpr size_t kLine = 64;  // bytes that one prefetch brings
template <class T>
constexpr int64_t kFetchedColumns = sizeof(T) == 2 ? 2048 : 16384;

// The moments of s, given the sum of its elements. A mean that is not far above the deviation is off by nothing that
// shows; else a pass over the deviations finds out by how much.
template <class S>
TW_INLINE Moments moments_of(const S* s, int64_t N, float total) {
  constexpr float kFar = 4.0f;  // squares of twice the deviation
  const float count = static_cast<float>(N), mean = total / count;
  auto centred = [&](int64_t i, auto lanes) __attribute__((always_inline)) { return load(s + i, lanes) - mean; };
  const float squares = sum_over(N, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec v = centred(i, lanes);
    return v * v;
  });
  const float variance = squares / count;
  if (__builtin_expect(mean * mean < kFar * variance && squares < __builtin_inff(), 1)) return {mean, 0.0f, variance};
  return corrected(mean, sum_over(N, centred), squares, count);
}

// Reads s once by load_s(i, lanes), which leaves it at `s` as well; then the variance and the output. Memory would be
// idle meanwhile, so the next row is fetched, unless that would drive this one, or its floats, from the caches.
template <class T, class S, class Weights, class LoadS>
TW_INLINE void normalise(const LayerNormForwardParams& p, int64_t m, const Weights& weights, bool streaming, const S* s,
                         LoadS&& load_s) {
  const int64_t N = p.cols;
  const T* next = row<T>(p.input, m + 1, N);
  const bool fetch = N <= kFetchedColumns<T>;
  T* y = row<T>(p.output, m, N);

  // Mean and variance; or the mean square.
  Moments moments{};
  if (p.centred) {
    moments = moments_of(s, N, sum_over(N, load_s));
  } else {
    const float squares = sum_over(N, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec v = load_s(i, lanes);
      return v * v;
    });
    moments.variance = squares / static_cast<float>(N);
  }
  const float rstd = 1.0f / __builtin_sqrtf(moments.variance + p.eps);

  // Normalise. Few rows have a rest, and RMS norm has neither mean nor bias: each loop has what it needs.
  auto write = [&](auto&& value) __attribute__((always_inline)) {
    for_each_value(
        N,
        [&](int64_t i, auto lanes)
            __attribute__((always_inline)) { return value(load(s + i, lanes), weights.weight(i, lanes), i, lanes); },
        [&](int64_t i, auto v, auto lanes) __attribute__((always_inline)) {
          if (fetch) __builtin_prefetch(next + i);
          if (fetch && 2 * W * sizeof(T) > kLine) __builtin_prefetch(next + i + W);
          store_output(y + i, v, lanes, streaming);
        });
  };
  if (!p.centred && p.bias == nullptr) {
    write([&](Vec v, Vec weight, int64_t, auto) __attribute__((always_inline)) { return v * rstd * weight; });
  } else if (moments.rest == 0.0f) {
    write([&](Vec v, Vec weight, int64_t i, auto lanes)
              __attribute__((always_inline)) { return (v - moments.mean) * rstd * weight + weights.bias(i, lanes); });
  } else {
    const float rest = moments.rest * rstd;
    write([&](Vec v, Vec weight, int64_t i, auto lanes) __attribute__((always_inline)) {
      return ((v - moments.mean) * rstd - rest) * weight + weights.bias(i, lanes);
    });
  }
  if (p.mean != nullptr) p.mean[m] = moments.mean + moments.rest;
  if (p.rstd != nullptr) p.rstd[m] = rstd;
}

// buffer: room for one row as floats, nullptr: its elements are loaded from memory as they are.
template <class T, class R, class Weights>
void forward_row(const LayerNormForwardParams& p, int64_t m, const Weights& weights, float* buffer, bool streaming) {
  constexpr bool kBuffered = std::is_same_v<Weights, BufferedWeights>;
  const int64_t N = p.cols;
  const T* x = row<T>(p.input, m, N);
  if (std::is_same_v<T, R> && p.residual == nullptr) {
    if constexpr (kBuffered && sizeof(T) == 2) {
      normalise<T>(p, m, weights, streaming, buffer, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        return store_rounded(buffer + i, load(x + i, lanes), lanes);
      });
    } else {
      normalise<T>(p, m, weights, streaming, x,
                   [&](int64_t i, auto lanes) __attribute__((always_inline)) { return load(x + i, lanes); });
    }
    return;
  }

  // The sum is rounded before it is normalised: the backward sees what was stored.
  const R* r = row<R>(p.residual, m, N);
  R* sum = row<R>(p.sum, m, N);
  auto add = [&](auto&& factors) __attribute__((always_inline)) {
    auto load_s = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec s = store_rounded(sum + i, load(r + i, lanes) + factors(load(x + i, lanes), i), lanes);
      if constexpr (kBuffered && sizeof(R) == 2) store(buffer + i, s, lanes);
      return s;
    };
    if constexpr (kBuffered && sizeof(R) == 2) {
      normalise<T>(p, m, weights, streaming, buffer, load_s);
    } else {
      normalise<T>(p, m, weights, streaming, sum, load_s);
    }
  };
  if (p.dropout.seed == nullptr) {
    add([](Vec v, int64_t) __attribute__((always_inline)) { return v; });
  } else {
    MaskRow mask(p.dropout, static_cast<uint64_t>(m));
    add([&](Vec v, int64_t i) __attribute__((always_inline)) { return v * mask.factors(i); });
  }
}

}  // namespace

namespace TORCHWELD_ISA {

void layer_norm_forward(const LayerNormForwardParams& p) {
  dispatch_sum(p.dtype, p.sum_dtype, [&](auto t, auto r) {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    const bool streaming = past_cache<T>(p.output, p.rows, p.cols);
    dispatch_weights<T>(p.cols, p.dtype, p.weight_dtype, [&](auto w) {
      using Weights = typename decltype(w)::type;
      parallel_for(p.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) {
        const Weights weights(p.weight, p.bias, p.weight_dtype, p.weight_offset, p.cols);
        alignas(64) float buffer[std::is_same_v<Weights, BufferedWeights> ? kBufferedColumns : 1];
        for (int64_t m = begin; m < end; ++m) forward_row<T, R>(p, m, weights, buffer, streaming);
      });
    });
  });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
