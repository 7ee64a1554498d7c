// Layer norm and RMS norm forward, with or without a residual add in front.
//
//   s = input, or residual + dropout(input)      xhat = (s - mean) * rstd      output = xhat * weight + bias
//
// RMS norm is the same with mean = 0. weight means weight + weight_offset.
//
// A thread owns whole rows. A row stays in cache, as floats up to kBufferedColumns, between the passes for mean,
// variance (about that mean, so nothing cancels) and output. If the mean is far above the deviation, one more pass sums
// the error of the mean (the corrected two-pass algorithm). Memory is read and written once: 2 values per element, 4
// with a residual. Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450. Zhang, Sennrich: Root Mean Square Layer
// Normalization, arXiv:1910.07467. Chan, Golub, LeVeque: Algorithms for Computing the Sample Variance.

#include <type_traits>

#include "cpu/norm/layer_norm.h"
#include "moments.h"

namespace torchweld::cpu {
namespace {

constexpr size_t kLine = 64;  // bytes that one prefetch brings
template <class T>
constexpr int64_t kFetchedColumns = sizeof(T) == 2 ? 2048 : 16384;

// The first pass over a row depends on all types. The other passes depend on fewer types, and are compiled for those.

// The sum of a row that load_s(i, lanes) reads, or the sum of its squares.
template <class Load>
TW_INLINE float first_sum(int64_t N, bool squares, Load&& load_s) {
  if (!squares) return sum_over(N, load_s);
  return sum_over(N, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec v = load_s(i, lanes);
    return v * v;
  });
}

template <class S>
TW_NOINLINE float first_sum_of(const S* s, int64_t N, bool squares) {
  return first_sum(N, squares,
                   [&](int64_t i, auto lanes) __attribute__((always_inline)) { return load(s + i, lanes); });
}

// The moments of s from the sum of its elements. If the mean is far above the deviation, its rounding error shows, and
// a pass over the deviations measures that error. If the error is nearly all of the deviations, they are measured again
// from the better mean.
template <class S>
TW_NOINLINE Moments moments_of(const S* s, int64_t N, float total) {
  constexpr float kFar = 4.0f;  // squares of twice the deviation
  const float count = static_cast<float>(N);
  float mean = total / count;
  auto centred = [&](int64_t i, auto lanes) __attribute__((always_inline)) { return load(s + i, lanes) - mean; };
  auto sum_squares = [&] {
    return sum_over(N, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec v = centred(i, lanes);
      return v * v;
    });
  };
  float squares = sum_squares();
  const float variance = squares / count;
  if (__builtin_expect(mean * mean < kFar * variance && squares < __builtin_inff(), 1)) return {mean, 0.0f, variance};
  float rest = sum_over(N, centred);
  if (is_coarse(rest, squares, count)) {
    mean += rest / count;
    squares = sum_squares();
    rest = sum_over(N, centred);
  }
  return corrected(mean, rest, squares, count);
}

// The output. The next row is fetched meanwhile, because memory would be idle; not where that would evict this row, or
// its floats, from the caches.
template <class T, class S, class Weights>
TW_NOINLINE void write_row(const LayerNormForwardParams& p, int64_t m, const Weights& weights, const S* s,
                           Moments moments, float rstd) {
  const int64_t N = p.cols;
  const T* next = row<T>(p.input, m + 1, N);
  const bool fetch = N <= kFetchedColumns<T>, streaming = past_cache<T>(p.output, p.rows, N);
  T* y = row<T>(p.output, m, N);

  // Few rows have a rest, and RMS norm has neither mean nor bias: each case has its own loop.
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
}

// The buffers of a thread.
struct Buffers {
  const BufferedWeights* weights;  // nullptr: the rows are too long for buffers
  float* row;                      // one row of floats
};

// Statistics and output of a row s, whose sum is given.
template <class T, class S>
TW_INLINE void finish_row(const LayerNormForwardParams& p, int64_t m, const Buffers& buffers, const S* s, float sum) {
  const Moments moments =
      p.centred ? moments_of(s, p.cols, sum) : Moments{0.0f, 0.0f, sum / static_cast<float>(p.cols)};
  const float rstd = 1.0f / __builtin_sqrtf(moments.variance + p.eps);
  if (std::is_same_v<S, float> && buffers.weights != nullptr) {
    if constexpr (std::is_same_v<S, float>) write_row<T>(p, m, *buffers.weights, s, moments, rstd);
  } else {
    dispatch_weights<T>(p.dtype, p.weight_dtype, [&](auto wt) {
      using WT = typename decltype(wt)::type;
      write_row<T>(p, m, DirectWeights<WT>(p.weight, p.bias, p.weight_offset), s, moments, rstd);
    });
  }
  if (p.mean != nullptr) p.mean[m] = moments.mean + moments.rest;
  if (p.rstd != nullptr) p.rstd[m] = rstd;
}

// Stores sum = residual + input * factors(i), rounded, because the backward reads the stored sum. Returns the rounded
// vector, and stores it to `copy` too if S is not R.
template <class R, class S, class T, class Lanes, class Factors>
TW_INLINE Vec add(R* sum, S* copy, const R* residual, const T* x, int64_t i, Lanes lanes, Factors&& factors) {
  const Vec s = store_rounded(sum + i, load(residual + i, lanes) + factors(load(x + i, lanes), i), lanes);
  if constexpr (!std::is_same_v<S, R>) store(copy + i, s, lanes);
  return s;
}

// The same for a whole row with dropout, whose random bits take most of the time.
template <class T, class R, class S>
TW_NOINLINE void add_dropped(const LayerNormForwardParams& p, int64_t m, S* copy) {
  MaskRow mask(p.dropout, static_cast<uint64_t>(m));
  const int64_t N = p.cols;
  for_each_vector(N, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    add(row<R>(p.sum, m, N), copy, row<R>(p.residual, m, N), row<T>(p.input, m, N), i, lanes,
        [&](Vec v, int64_t at) __attribute__((always_inline)) { return v * mask.factors(at); });
  });
}

// S: the type of a row in the caches between the passes. Rows that fit are converted to floats once.
template <class T, class R, class S>
TW_NOINLINE void forward_rows(const LayerNormForwardParams& p, int64_t begin, int64_t end, const Buffers& buffers) {
  const int64_t N = p.cols;
  const bool squares = !p.centred;
  for (int64_t m = begin; m < end; ++m) {
    const T* x = row<T>(p.input, m, N);
    if (std::is_same_v<T, R> && p.residual == nullptr) {
      if constexpr (std::is_same_v<T, S>) {
        finish_row<T>(p, m, buffers, x, first_sum_of(x, N, squares));
      } else {
        S* s = buffers.row;
        finish_row<T>(p, m, buffers, s,
                      first_sum(N, squares, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
                        return store_rounded(s + i, load(x + i, lanes), lanes);
                      }));
      }
      continue;
    }
    R* sum = row<R>(p.sum, m, N);
    S* s;
    if constexpr (std::is_same_v<R, S>)
      s = sum;
    else
      s = buffers.row;
    if (p.dropout.seed == nullptr) {
      const R* residual = row<R>(p.residual, m, N);
      finish_row<T>(p, m, buffers, s, first_sum(N, squares, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
                      return add(sum, s, residual, x, i, lanes,
                                 [](Vec v, int64_t) __attribute__((always_inline)) { return v; });
                    }));
    } else {
      add_dropped<T, R>(p, m, s);
      finish_row<T>(p, m, buffers, s, first_sum_of(s, N, squares));
    }
  }
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void layer_norm_forward(const LayerNormForwardParams& p) {
  dispatch_sum(p.dtype, p.sum_dtype, [&](auto t, auto r) {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    parallel_for(p.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) {
      if (p.cols > kBufferedColumns) return forward_rows<T, R, R>(p, begin, end, {nullptr, nullptr});
      const BufferedWeights weights(p.weight, p.bias, p.weight_dtype, p.weight_offset, p.cols);
      alignas(64) float buffer[kBufferedColumns];
      forward_rows<T, R, float>(p, begin, end, {&weights, buffer});
    });
  });
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
