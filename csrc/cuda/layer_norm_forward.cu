// Layer norm forward, with or without a residual add in front.
//
//   s = input + residual     xhat = (s - mean(s)) * rstd     output = xhat * weight + bias
//
// - forward_rows (N <= 16384): the lanes of a row hold all of it in registers, so memory is read and written once: 2
//   values per element, 4 with a residual. Up to 256 columns a row has part of a warp with 8 columns per lane, beyond
//   that as many warps as 32 columns per lane take. Grid -> groups of blockDim.y rows.
// - forward_long_rows: one block per row, tile by tile; the passes for variance and output read the row again, out of
// L2
//   as far as that holds the rows in flight. So do rows of N > 8192 that cannot be accessed 16 bytes at a time.
//
// The variance is taken about the mean (two passes, no cancellation); statistics are fp32. Sums have one fixed order.
// Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450.

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/layer_norm.cuh"

namespace torchweld::cuda {
namespace {

constexpr const char* kName = "layer_norm_forward";
constexpr int kShortRow = 256, kShortSlice = 8, kShortThreads = 256;  // columns, columns per lane, threads per block
constexpr int kWarpRowThreads = 128, kMaxThreads = 512;               // where a row has one warp; where it has the most

// Columns per lane of the rows between, and of a tile of the long ones: fewer where every column is an access of its
// own.
template <int V>
constexpr int kSlice = V > 1 ? 32 : 16;
template <int V>
constexpr int kLongSlice = kSlice<V> / 2;
template <int V>
constexpr int kLongestRow = kSlice<V> * kMaxThreads;

// What is normalised of row m at `column`: input, or the sum with the residual, rounded to T and stored on the way, so
// that the backward sees what was normalised.
template <class T, int E, int V>
__device__ __forceinline__ Slice<T, E, V> load_sum(const LayerNormForwardParams& p, int64_t offset,
                                                   const Columns<E, V>& own) {
  Slice<T, E, V> x;
  x.load_once(at<T>(p.input, offset), own);
  if (p.residual != nullptr) {
    Slice<T, E, V> r;
    r.load_once(at<T>(p.residual, offset), own);
#pragma unroll
    for (int c = 0; c < x.kRuns; ++c) {
      const Run<T, V> a = x.runs[c];
      x.runs[c].set([&](int i) { return a[i] + r.runs[c][i]; });
    }
    x.store(at<T>(p.sum, offset), own);
  }
  return x;
}

template <class T, int E, int V>
__device__ __forceinline__ float sum(const Slice<T, E, V>& x) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < E; ++e) total += x.runs[e / V][e % V];
  return total;
}

template <class T, int E, int V>
__device__ __forceinline__ float sum_of_squares(const Slice<T, E, V>& x, float mean, const Columns<E, V>& own) {
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < x.kRuns; ++c) {
    if (!own.has(c)) continue;  // a zero that is not there is not mean away from the mean
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float centred = x.runs[c][i] - mean;
      total += centred * centred;
    }
  }
  return total;
}

template <class T, class WT, int E, int V>
__device__ __forceinline__ void store_normalised(const LayerNormForwardParams& p, int64_t start, int64_t column,
                                                 const Slice<T, E, V>& x, float mean, float rstd,
                                                 const Columns<E, V>& own) {
  const WT* weight = p.weight != nullptr ? at<WT>(p.weight, column) : nullptr;
  const WT* bias = p.bias != nullptr ? at<WT>(p.bias, column) : nullptr;
  T* output = at<T>(p.output, start);
  const float offset = weight != nullptr ? p.weight_offset : 0.0f;
#pragma unroll
  for (int c = 0; c < x.kRuns; ++c) {
    if (!own.has(c)) continue;
    Run<WT, V> w, b;
    w.set([](int) { return 1.0f; });
    b.set([](int) { return 0.0f; });
    if (weight != nullptr) w.load(weight + own.first(c));
    if (bias != nullptr) b.load(bias + own.first(c));
    Run<T, V> y;
    y.set([&](int i) { return (x.runs[c][i] - mean) * rstd * (w[i] + offset) + b[i]; });
    y.store(output + own.first(c));
  }
}

template <class T, class WT, int E, int V>
__global__ void __launch_bounds__(kMaxThreads, V == 8 ? 2 : 1)
    forward_rows(const __grid_constant__ LayerNormForwardParams p) {
  const int N = static_cast<int>(p.cols);
  RowSums<1> sum_over_row;

  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.y; base < p.rows; base += step) {
    const int64_t m = base + threadIdx.y;
    const bool exists = m < p.rows;
    const auto own =
        E > kShortSlice ? Columns<E, V>::of_warps(exists ? N : 0) : Columns<E, V>::of_lanes(exists ? N : 0);

    // Load.
    const Slice<T, E, V> x = load_sum<T, E, V>(p, m * N, own);

    // Mean.
    float mean = 0.0f;
    if (p.centred) {
      float total[1] = {sum(x)};
      sum_over_row(total);
      mean = total[0] / static_cast<float>(N);
    }

    // Variance.
    float squares[1] = {sum_of_squares(x, mean, own)};
    sum_over_row(squares);
    const float rstd = rsqrtf(squares[0] / static_cast<float>(N) + p.eps);

    // Normalise.
    store_normalised<T, WT>(p, m * N, 0, x, mean, rstd, own);
    if (exists && threadIdx.x == 0) {
      if (p.mean != nullptr) p.mean[m] = mean;
      if (p.rstd != nullptr) p.rstd[m] = rstd;
    }
  }
}

template <class T, class WT, int V>
__global__ void __launch_bounds__(kMaxThreads) forward_long_rows(const __grid_constant__ LayerNormForwardParams p) {
  constexpr int E = kLongSlice<V>, kTile = E * kMaxThreads;
  const int64_t N = p.cols;
  RowSums<1> sum_over_row;
  const void* normalised = p.residual != nullptr ? p.sum : p.input;
  auto own_of = [&](int64_t tile) { return Columns<E, V>::of_warps(N - tile < kTile ? N - tile : kTile); };

  for (int64_t m = blockIdx.x; m < p.rows; m += gridDim.x) {
    // Mean.
    float total[1] = {};
    for (int64_t tile = 0; tile < N; tile += kTile) total[0] += sum(load_sum<T, E, V>(p, m * N + tile, own_of(tile)));
    sum_over_row(total);
    const float mean = p.centred ? total[0] / static_cast<float>(N) : 0.0f;

    // Variance.
    float squares[1] = {};
    for (int64_t tile = 0; tile < N; tile += kTile) {
      Slice<T, E, V> x;
      x.reload(at<T>(normalised, m * N + tile), own_of(tile));
      squares[0] += sum_of_squares(x, mean, own_of(tile));
    }
    sum_over_row(squares);
    const float rstd = rsqrtf(squares[0] / static_cast<float>(N) + p.eps);

    // Normalise.
    for (int64_t tile = 0; tile < N; tile += kTile) {
      Slice<T, E, V> x;
      x.reload(at<T>(normalised, m * N + tile), own_of(tile));
      store_normalised<T, WT>(p, m * N + tile, tile, x, mean, rstd, own_of(tile));
    }
    if (threadIdx.x == 0) {
      if (p.mean != nullptr) p.mean[m] = mean;
      if (p.rstd != nullptr) p.rstd[m] = rstd;
    }
  }
}

template <int V>
dim3 block_for(int64_t cols) {
  if (cols > kLongestRow<V>) return dim3(kMaxThreads);
  if (cols <= kShortRow) {
    const int lanes = lanes_for(cols, kShortSlice);
    return dim3(lanes, kShortThreads / lanes);
  }
  const int lanes = std::max(kWarp, lanes_for(cols, kSlice<V>));
  return dim3(lanes, lanes == kWarp ? kWarpRowThreads / kWarp : 1);
}

}  // namespace

void layer_norm_forward(const LayerNormForwardParams& p, Stream stream) {
  if (p.dropout.seed != nullptr || p.sum_dtype != p.dtype)
    throw std::invalid_argument(std::string("[") + kName + "] no dropout and no residual of another dtype on CUDA");
  if (p.rows == 0) return;
  dispatch_types(kName, p.dtype, p.weight_dtype, [&](auto t, auto wt) {
    using T = typename decltype(t)::type;
    using WT = typename decltype(wt)::type;
    const bool packets = in_packets<T>(p.cols, p.input, p.residual, p.weight, p.bias, p.sum, p.output);
    dispatch_width<T>(packets, [&](auto width) {
      constexpr int V = decltype(width)::value;
      auto* kernel = p.cols <= kShortRow        ? forward_rows<T, WT, kShortSlice, V>
                     : p.cols <= kLongestRow<V> ? forward_rows<T, WT, kSlice<V>, V>
                                                : forward_long_rows<T, WT, V>;
      const dim3 block = block_for<V>(p.cols);
      const int64_t groups = (p.rows + block.y - 1) / block.y;
      const dim3 grid(static_cast<unsigned>(groups < INT32_MAX ? groups : INT32_MAX));
      launch(kName, kernel, grid, block, RowSums<1>::floats(block.x * block.y) * sizeof(float), stream, p);
    });
  });
}

}  // namespace torchweld::cuda
