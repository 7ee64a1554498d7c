// Layer norm and RMS norm backward.
//
//   xhat = (input - mean) * rstd   g = doutput * weight   dinput = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum
//   dx = dropout(dinput)           dweight = sum over rows of doutput * xhat        dbias = sum over rows of doutput
//
// RMS norm is the same with mean = mean(g) = 0. weight means weight + weight_offset. If the mean is far above the
// deviation, the rounding of the mean gives xhat a mean, which is subtracted before dinput.
//
// A block of rows owns the rows' dinput and one fp32 partial of the weight gradients. The shape alone decides the
// blocks, so the sums have one order at any number of threads. g and xhat of a row of up to kBufferedColumns stay in
// cache as floats between the two passes. Memory is read and written once: 3 values per element, 4 with dsum.
// Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450. Zhang, Sennrich: Root Mean Square Layer Normalization,
// arXiv:1910.07467.

#include <type_traits>

#include "cpu/norm/layer_norm.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kChain = 4096;  // columns that one chain of float32 additions sums

// The weight gradients that a block adds up.
enum class Gradients { none, weight, both };

// g and xhat for the second pass: stored by the first pass, or computed again.
struct BufferedRow {
  const float *g_, *xhat_;
  template <class Lanes>
  TW_INLINE Vec g(int64_t i, Lanes lanes) const {
    return load(g_ + i, lanes);
  }
  template <class Lanes>
  TW_INLINE Vec xhat(int64_t i, Lanes lanes) const {
    return load(xhat_ + i, lanes);
  }
};

template <class T, class R, class Weights>
struct DirectRow {
  const T* doutput;
  const R* input;
  float mean, rstd;
  Weights weights;
  template <class Lanes>
  TW_INLINE Vec g(int64_t i, Lanes lanes) const {
    return load(doutput + i, lanes) * weights.weight(i, lanes);
  }
  template <class Lanes>
  TW_INLINE Vec xhat(int64_t i, Lanes lanes) const {
    return (load(input + i, lanes) - mean) * rstd;
  }
};

// The second pass: the input gradient.
template <class T, class R, class Row>
TW_NOINLINE void input_gradient(const LayerNormBackwardParams& p, int64_t m, float mean_g, float mean_gx,
                                const Row& of) {
  const int64_t N = p.cols;
  const float rstd = p.rstd[m];
  const bool streaming = past_cache<R>(p.dinput, p.rows, N), dx_streaming = past_cache<T>(p.dx, p.rows, N);
  const R* ds = p.dsum != nullptr ? row<R>(p.dsum, m, N) : nullptr;
  R* dinput = p.dinput != nullptr ? row<R>(p.dinput, m, N) : nullptr;
  T* dx = p.dx != nullptr ? row<T>(p.dx, m, N) : nullptr;

  // loop(value): value(i, lanes) is one basic block with and without dsum, so that the compiler contracts its products
  // and sums in the same way.
  auto with_dsum = [&](auto&& loop) __attribute__((always_inline)) {
    auto value = [&](auto&& dsum) __attribute__((always_inline)) {
      loop([&](int64_t i, auto lanes) __attribute__((always_inline)) {
        return (of.g(i, lanes) - mean_g - of.xhat(i, lanes) * mean_gx) * rstd + dsum(i, lanes);
      });
    };
    if (ds == nullptr) return value([](int64_t, auto) __attribute__((always_inline)) { return Vec{}; });
    value([&](int64_t i, auto lanes) __attribute__((always_inline)) { return load(ds + i, lanes); });
  };
  auto pass = [&](auto&& store_dx) __attribute__((always_inline)) {
    with_dsum([&](auto&& value) __attribute__((always_inline)) {
      for_each_value(N, value, [&](int64_t i, auto v, auto lanes) __attribute__((always_inline)) {
        if (dinput != nullptr) store_output(dinput + i, v, lanes, streaming);
        store_dx(i, v, lanes);
      });
    });
  };
  if (dx == nullptr) return pass([](int64_t, auto, auto) __attribute__((always_inline)) {});
  if (p.dropout.seed == nullptr)
    return pass([&](int64_t i, auto v, auto lanes)
                    __attribute__((always_inline)) { store_output(dx + i, v, lanes, dx_streaming); });

  // One vector at a time is the shorter code, and random bits take most of the time.
  MaskRow mask(p.dropout, static_cast<uint64_t>(m));
  with_dsum([&](auto&& value) __attribute__((always_inline)) {
    for_each_vector(N, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec v = value(i, lanes);
      if (dinput != nullptr) store_output(dinput + i, v, lanes, streaming);
      store_output(dx + i, v * mask.factors(i), lanes, dx_streaming);
    });
  });
}

// One row. The weight gradients are added to dweight and dbias. buffer: two rows of floats.
template <class T, class R, Gradients kGradients, class Weights>
void backward_row(const LayerNormBackwardParams& p, int64_t m, const Weights& weights, float* dweight, float* dbias,
                  float* buffer) {
  constexpr bool kBuffered = std::is_same_v<Weights, BufferedWeights>;
  const int64_t N = p.cols;
  const T* doutput = row<T>(p.doutput, m, N);
  const R* input = row<R>(p.input, m, N);
  const float mean = p.mean != nullptr ? p.mean[m] : 0.0f, rstd = p.rstd[m];

  // Row sums and weight gradients. Lanes past the row have doutput = 0.
  Vec sum_g{}, sum_x{}, sum_gx{};
  for (int64_t begin = 0; begin < N; begin += kChain) {
    Vec chain_g{}, chain_x{}, chain_gx{};
    for_each_vector(N - begin < kChain ? N - begin : kChain, [&](int64_t k, auto lanes) __attribute__((always_inline)) {
      const int64_t i = begin + k;
      const Vec d = load(doutput + i, lanes), xhat = (load(input + i, lanes) - mean) * rstd;
      const Vec g = d * weights.weight(i, lanes);
      chain_g += g;
      chain_x += keep(xhat, lanes, 0.0f);
      chain_gx += g * xhat;
      if constexpr (kGradients != Gradients::none) store(dweight + i, load(dweight + i, lanes) + d * xhat, lanes);
      if constexpr (kGradients == Gradients::both) store(dbias + i, load(dbias + i, lanes) + d, lanes);
      if constexpr (kBuffered) {
        store(buffer + i, g, lanes);
        store(buffer + kBufferedColumns + i, xhat, lanes);
      }
    });
    sum_g += chain_g;
    sum_x += chain_x;
    sum_gx += chain_gx;
  }
  if (p.dinput == nullptr && p.dx == nullptr) return;

  // Input gradient.
  const float count = static_cast<float>(N);
  const float mean_x = p.mean != nullptr ? sum(sum_x) / count : 0.0f;
  float mean_g = p.mean != nullptr ? sum(sum_g) / count : 0.0f;
  const float mean_gx = sum(sum_gx) / count - mean_x * mean_g;
  mean_g -= mean_x * mean_gx;
  if constexpr (kBuffered)
    input_gradient<T, R>(p, m, mean_g, mean_gx, BufferedRow{buffer, buffer + kBufferedColumns});
  else
    input_gradient<T, R>(p, m, mean_g, mean_gx, DirectRow<T, R, Weights>{doutput, input, mean, rstd, weights});
}

// Rows [begin, end) of one block; partial: its dweight and dbias, nullptr: not wanted.
template <class T, class R, Gradients kGradients, class Weights>
void backward_rows(const LayerNormBackwardParams& p, int64_t begin, int64_t end, const Weights& weights,
                   float* partial) {
  alignas(64) float buffer[std::is_same_v<Weights, BufferedWeights> ? 2 * kBufferedColumns : 1];
  if constexpr (kGradients != Gradients::none) std::memset(partial, 0, 2 * p.cols * sizeof(float));
  for (int64_t m = begin; m < end; ++m)
    backward_row<T, R, kGradients>(p, m, weights, partial, partial + p.cols, buffer);
}

// dweight and dbias: the sum of the blocks' partials, eight at a time, because short chains of additions round less.
template <class WT>
void reduce_partials(const LayerNormBackwardParams& p) {
  const int64_t N = p.cols;
  auto reduce = [&](const float* partial, void* out, int64_t begin, int64_t end) {
    if (out == nullptr) return;
    for_each_vector(end - begin, [&](int64_t i, auto lanes) {
      Vec total{};
      for (int64_t b = 0; b < p.blocks;) {
        Vec chain{};
        for (const int64_t after = b + 8 < p.blocks ? b + 8 : p.blocks; b < after; ++b)
          chain += load(partial + b * 2 * N + begin + i, lanes);
        total += chain;
      }
      store(static_cast<WT*>(out) + begin + i, total, lanes);
    });
  };
  const int64_t groups = (N + 63) / 64;
  parallel_for(groups, row_grain(64 * p.blocks), [&](int64_t first, int64_t last) {
    const int64_t begin = first * 64, end = last * 64 < N ? last * 64 : N;
    reduce(p.partial, p.dweight, begin, end);
    reduce(p.partial + N, p.dbias, begin, end);
  });
}

template <class Weights>
Weights weights_of(const LayerNormBackwardParams& p) {
  if constexpr (std::is_same_v<Weights, BufferedWeights>)
    return BufferedWeights(p.weight, nullptr, p.weight_dtype, p.weight_offset, p.cols);
  else
    return Weights(p.weight, nullptr, p.weight_offset);
}

// All blocks of rows, with their partials if weight gradients are wanted.
template <class T, class R, Gradients kGradients, class Weights>
void backward_blocks(const LayerNormBackwardParams& p) {
  constexpr bool partials = kGradients != Gradients::none;
  const int64_t blocks = partials ? p.blocks : p.rows,
                rows_per_block = partials && p.rows > p.blocks ? p.rows / p.blocks : 1;
  parallel_for(blocks, row_grain(p.cols * rows_per_block), [&](int64_t begin, int64_t end) {
    const auto weights = weights_of<Weights>(p);
    if constexpr (!partials) return backward_rows<T, R, kGradients>(p, begin, end, weights, nullptr);
    for (int64_t b = begin; b < end; ++b)
      backward_rows<T, R, kGradients>(p, p.rows * b / p.blocks, p.rows * (b + 1) / p.blocks, weights,
                                      p.partial + b * 2 * p.cols);
  });
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void layer_norm_backward(const LayerNormBackwardParams& p) {
  dispatch_sum(p.dtype, p.sum_dtype, [&](auto t, auto r) {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    auto blocks = [&](auto weights) {
      using Weights = typename decltype(weights)::type;
      p.partial == nullptr ? backward_blocks<T, R, Gradients::none, Weights>(p)
      : p.dbias == nullptr ? backward_blocks<T, R, Gradients::weight, Weights>(p)
                           : backward_blocks<T, R, Gradients::both, Weights>(p);
    };
    if (p.cols <= kBufferedColumns) return blocks(Tag<BufferedWeights>{});
    dispatch_weights<T>(p.dtype, p.weight_dtype,
                        [&](auto wt) { blocks(Tag<DirectWeights<typename decltype(wt)::type>>{}); });
  });
  if (p.partial != nullptr) dispatch(p.weight_dtype, [&](auto wt) { reduce_partials<typename decltype(wt)::type>(p); });
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
