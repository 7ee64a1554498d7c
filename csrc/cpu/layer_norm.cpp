// Layer norm and RMS norm, with or without a residual add in front, forward and backward.
//
//   s = input + residual           xhat = (s - mean) * rstd        output = xhat * weight + bias
//   g = doutput * weight           dinput = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum
//   dweight = sum over rows of doutput * xhat                      dbias = sum over rows of doutput
//
// RMS norm is the same without mean, mean(g) and bias. weight stands for weight + weight_offset.
//
// Forward: a thread owns whole rows; a row stays in cache between the passes for mean, variance (about that mean, so no
// cancellation) and output. Memory is read and written once: 2 values per element, 4 with a residual.
// Backward: a row block owns its rows' dinput and one fp32 partial of the weight gradients; blocks are fixed by the
// shape, so the sums have one order at any number of threads. 3 values per element, 4 with dsum.
// Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450. Zhang, Sennrich: Root Mean Square Layer Normalization,
// arXiv:1910.07467.

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings
// From here on four rows of the backward go together; four short ones would share pages and confuse the prefetcher
// (measured at 768 columns: 3.0 ms one by one, 3.8 ms by four; at 4096 columns 6.5 ms and 4.4 ms).
constexpr int64_t kLongRow = 2048;

int64_t row_grain(int64_t cols) { return cols < kElementsPerThread ? kElementsPerThread / cols : 1; }

template <class T>
const T* row(const void* base, int64_t index, int64_t cols) {
  return static_cast<const T*>(base) + index * cols;
}
template <class T>
T* row(void* base, int64_t index, int64_t cols) {
  return static_cast<T*>(base) + index * cols;
}

template <class T, class WT>
void forward_row(const LayerNormForwardParams& p, int64_t m, bool streaming) {
  const int64_t N = p.cols;
  const T* x = row<T>(p.input, m, N);
  const WT* weight = static_cast<const WT*>(p.weight);
  const WT* bias = static_cast<const WT*>(p.bias);
  T* y = row<T>(p.output, m, N);

  // Mean. The sum is rounded to T before it is normalised: the backward sees what was stored.
  if (p.residual != nullptr) {
    const T* r = row<T>(p.residual, m, N);
    T* s = row<T>(p.sum, m, N);
    for_each_vector(N, [&](int64_t i, auto lanes) { store(s + i, load(x + i, lanes) + load(r + i, lanes), lanes); });
    x = s;
  }
  const float mean =
      p.centred ? sum_over(N, [&](int64_t i, auto lanes) { return load(x + i, lanes); }) / static_cast<float>(N) : 0.0f;

  // Variance.
  const float squares = sum_over(N, [&](int64_t i, auto lanes) {
    const Vec centred = load(x + i, lanes) - mean;
    return centred * centred;
  });
  const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(N) + p.eps);

  // Normalise.
  for_each_vector(N, [&](int64_t i, auto lanes) {
    Vec v = (load(x + i, lanes) - mean) * rstd;
    if (weight != nullptr) v = v * (load(weight + i, lanes) + p.weight_offset);
    if (bias != nullptr) v = v + load(bias + i, lanes);
    store_output(y + i, v, lanes, streaming);
  });
  if (p.mean != nullptr) p.mean[m] = mean;
  if (p.rstd != nullptr) p.rstd[m] = rstd;
}

// R rows at a time share each load of the weight and each update of the partial sums.
template <class T, class WT, int R, bool kWeights>
TW_INLINE void backward_rows(const LayerNormBackwardParams& p, int64_t m, float* dweight, float* dbias) {
  const int64_t N = p.cols;
  const WT* weight = static_cast<const WT*>(p.weight);
  const T *dy[R], *x[R];
  float mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    dy[r] = row<T>(p.doutput, m + r, N);
    x[r] = row<T>(p.input, m + r, N);
    mean[r] = p.mean != nullptr ? p.mean[m + r] : 0.0f;
    rstd[r] = p.rstd[m + r];
  }

  // Row sums and weight gradients.
  Vec sum_g[R] = {}, sum_gx[R] = {};
  for_each_vector(N, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec w = weight != nullptr ? load(weight + i, lanes) + p.weight_offset : splat(1.0f);
    Vec dw{}, db{};
    for (int r = 0; r < R; ++r) {
      const Vec d = load(dy[r] + i, lanes);  // zero in the lanes that are not there
      const Vec d_xhat = d * ((load(x[r] + i, lanes) - mean[r]) * rstd[r]);
      sum_g[r] += d * w;
      sum_gx[r] += d_xhat * w;
      dw += d_xhat;
      db += d;
    }
    if constexpr (kWeights) {
      store(dweight + i, load(dweight + i, lanes) + dw, lanes);
      store(dbias + i, load(dbias + i, lanes) + db, lanes);
    }
  });
  if (p.dinput == nullptr) return;

  // Input gradient.
  const bool streaming = past_cache<T>(p.dinput, p.rows, N);
  for (int r = 0; r < R; ++r) {
    const float mean_g = p.mean != nullptr ? sum(sum_g[r]) / static_cast<float>(N) : 0.0f;
    const float mean_gx = sum(sum_gx[r]) / static_cast<float>(N);
    const float scale = rstd[r] * mean_gx;
    const T* ds = p.dsum != nullptr ? row<T>(p.dsum, m + r, N) : nullptr;
    T* dx = row<T>(p.dinput, m + r, N);
    for_each_vector(N, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec w = weight != nullptr ? load(weight + i, lanes) + p.weight_offset : splat(1.0f);
      Vec v = (load(dy[r] + i, lanes) * w - mean_g - (load(x[r] + i, lanes) - mean[r]) * scale) * rstd[r];
      if (ds != nullptr) v += load(ds + i, lanes);
      store_output(dx + i, v, lanes, streaming);
    });
  }
}

// Rows [begin, end) of one block; partial: its dweight and dbias, nullptr when none are wanted.
template <class T, class WT, bool kWeights>
void backward_block(const LayerNormBackwardParams& p, int64_t begin, int64_t end, float* partial) {
  float* dweight = partial;
  float* dbias = kWeights ? partial + p.cols : nullptr;
  if constexpr (kWeights) std::memset(partial, 0, 2 * p.cols * sizeof(float));
  int64_t m = begin;
  if (p.cols >= kLongRow)
    for (; m + 4 <= end; m += 4) backward_rows<T, WT, 4, kWeights>(p, m, dweight, dbias);
  for (; m < end; ++m) backward_rows<T, WT, 1, kWeights>(p, m, dweight, dbias);
}

// dweight and dbias: the sum of the blocks' partials, first to last.
template <class WT>
void reduce_partials(const LayerNormBackwardParams& p) {
  const int64_t N = p.cols;
  auto reduce = [&](const float* partial, void* out, int64_t begin, int64_t end) {
    if (out == nullptr) return;
    for_each_vector(end - begin, [&](int64_t i, auto lanes) {
      Vec total{};
      for (int64_t b = 0; b < p.blocks; ++b) total += load(partial + b * 2 * N + begin + i, lanes);
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

// f(Tag<T>, Tag<WT>) for the five pairs in use: the parameters are float32 or of the activations' type.
template <class F>
void dispatch_types(DType dtype, DType weight_dtype, F&& f) {
  dispatch(dtype, [&](auto t) { weight_dtype == dtype ? f(t, t) : f(t, Tag<float>{}); });
}

}  // namespace

namespace TORCHWELD_ISA {

void layer_norm_forward(const LayerNormForwardParams& p) {
  dispatch_types(p.dtype, p.weight_dtype, [&](auto t, auto wt) {
    using T = typename decltype(t)::type;
    using WT = typename decltype(wt)::type;
    const bool streaming = past_cache<T>(p.output, p.rows, p.cols);
    parallel_for(p.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) forward_row<T, WT>(p, m, streaming);
    });
  });
}

void layer_norm_backward(const LayerNormBackwardParams& p) {
  dispatch_types(p.dtype, p.weight_dtype, [&](auto t, auto wt) {
    using T = typename decltype(t)::type;
    using WT = typename decltype(wt)::type;
    if (p.partial == nullptr) {
      parallel_for(p.rows, row_grain(p.cols),
                   [&](int64_t begin, int64_t end) { backward_block<T, WT, false>(p, begin, end, nullptr); });
      return;
    }
    const int64_t rows_per_block = (p.rows + p.blocks - 1) / p.blocks;
    parallel_for(p.blocks, row_grain(p.cols * (rows_per_block > 0 ? rows_per_block : 1)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t b = begin; b < end; ++b)
                     backward_block<T, WT, true>(p, p.rows * b / p.blocks, p.rows * (b + 1) / p.blocks,
                                                 p.partial + b * 2 * p.cols);
                 });
    reduce_partials<WT>(p);
  });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
