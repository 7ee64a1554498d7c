// Layer norm and RMS norm forward, with or without a residual add in front.
//
//   s = input, or residual + dropout(input)     xhat = (s - mean(s)) * rstd     output = xhat * weight + bias
//
// RMS norm is the same with mean = 0. weight stands for weight + weight_offset.
//
// - forward_rows (N <= 16384): the lanes of a row hold all of it in registers, so memory is read and written once: 2
//   values per element, 4 with a residual. Up to 256 columns a row has part of a warp with 8 columns per lane, beyond
//   that as many warps as 32 columns per lane take. Grid -> groups of blockDim.y rows.
// - forward_long_rows: one block per row, tile by tile; the passes for variance and output read the row again, out of
//   L2 as far as that holds the rows in flight. So do rows of N > 8192 that cannot be accessed 16 bytes at a time.
// - statistics_of_slabs, normalise_slabs: long rows that are too few to fill the device are cut into slabs of 16384
//   columns. A slab leaves its mean and the sums about it; all blocks of a row then combine these in
//   one order. 3 values per element, less what L2 still holds: the second kernel goes backwards.
//
// The variance is taken about the mean (two passes, no cancellation), and the second pass also sums what the mean is
// off by; statistics are fp32. Sums have one fixed order. Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450.
// Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv:1910.07467. Chan, Golub, LeVeque: Updating Formulae and
// a Pairwise Algorithm for Computing Sample Variances.

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/norm/layer_norm.cuh"
#include "moments.h"

namespace torchweld::cuda {
namespace {

constexpr const char* kName = "layer_norm_forward";
constexpr int kShortRow = 256, kShortSlice = 8, kShortThreads = 256;  // columns, columns per lane, threads per block
constexpr int kFewRows = 2;  // long rows per multiprocessor, below which they are cut into slabs
constexpr int kWarpRowThreads = 128, kMaxThreads = 512;  // where a row has one warp; where it has the most

// Columns per lane of the rows between, and of a tile of the long ones: fewer where every column is an access of its
// own.
template <int V>
constexpr int kSlice = V > 1 ? 32 : 16;
template <int V>
constexpr int kLongSlice = kSlice<V> / 2;
template <int V>
constexpr int kLongestRow = kSlice<V> * kMaxThreads;

// What is normalised of row m from `column`: input, or the sum with the residual, rounded to R and stored on the way,
// so that the backward sees what was normalised.
template <class T, class R, int E, int V>
__device__ __forceinline__ Slice<R, E, V> load_sum(const LayerNormForwardParams& p, int64_t m, int64_t column,
                                                   const Columns<E, V>& own) {
  const int64_t start = m * p.cols + column;
  const Mask<E, V> mask(p.dropout, m, column, own);
  Slice<T, E, V> x;
  x.load_once(at<T>(p.input, start), own);
  if constexpr (std::is_same_v<T, R>)
    if (p.residual == nullptr) return x;
  Slice<R, E, V> s;
  constexpr int kDepth = s.kRuns >= 4 ? s.kRuns / 2 : s.kRuns;  // all at once would take too many registers
#pragma unroll
  for (int first = 0; first < s.kRuns; first += kDepth) {
    Run<R, V> r[kDepth] = {};
#pragma unroll
    for (int c = 0; c < kDepth; ++c)
      if (own.has(first + c)) r[c].load_once(at<R>(p.residual, start) + own.first(first + c));
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      Run<R, V>& run = s.runs[first + c];
      run.set([&](int i) { return r[c][i] + mask((first + c) * V + i, x.runs[first + c][i], p.dropout); });
      if (own.has(first + c)) run.store(at<R>(p.sum, start) + own.first(first + c));
    }
  }
  return s;
}

template <class T, int E, int V>
__device__ __forceinline__ float sum(const Slice<T, E, V>& x) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < E; ++e) total += x.runs[e / V][e % V];
  return total;
}

// sums += those of x - mean, and of its squares.
template <class T, int E, int V>
__device__ __forceinline__ void add_centred(float (&sums)[2], const Slice<T, E, V>& x, float mean,
                                            const Columns<E, V>& own) {
#pragma unroll
  for (int c = 0; c < x.kRuns; ++c) {
    if (!own.has(c)) continue;  // a zero that is not there is not mean away from the mean
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float centred = x.runs[c][i] - mean;
      sums[0] += centred;
      sums[1] += centred * centred;
    }
  }
}

// Of a row, given the sums that add_centred leaves.
__device__ __forceinline__ Moments moments(const LayerNormForwardParams& p, float mean, const float (&sums)[2]) {
  const float count = static_cast<float>(p.cols);
  return p.centred ? corrected(mean, sums[0], sums[1], count) : Moments{0.0f, 0.0f, sums[1] / count};
}

template <class T, class WT, class R, int E, int V>
__device__ __forceinline__ void store_normalised(const LayerNormForwardParams& p, int64_t m, int64_t column,
                                                 const Slice<R, E, V>& x, const Moments& row, float rstd,
                                                 const Columns<E, V>& own) {
  const float rest = p.centred ? row.rest * rstd : 0.0f;  // rstd may be infinite
  const WT* weight = p.weight != nullptr ? at<WT>(p.weight, column) : nullptr;
  const WT* bias = p.bias != nullptr ? at<WT>(p.bias, column) : nullptr;
  T* output = at<T>(p.output, m * p.cols + column);
#pragma unroll
  for (int c = 0; c < x.kRuns; ++c) {
    if (!own.has(c)) continue;
    Run<WT, V> w, b;
    w.set([](int) { return 1.0f; });
    b.set([](int) { return -0.0f; });  // what leaves every sum as it is
    if (weight != nullptr) w.load(weight + own.first(c));
    if (bias != nullptr) b.load(bias + own.first(c));
    Run<T, V> y;
    y.set([&](int i) { return ((x.runs[c][i] - row.mean) * rstd - rest) * (w[i] + p.weight_offset) + b[i]; });
    y.store(output + own.first(c));
  }
}

__device__ __forceinline__ void store_statistics(const LayerNormForwardParams& p, int64_t m, const Moments& row,
                                                 float rstd) {
  if (threadIdx.x > 0) return;
  if (p.mean != nullptr) p.mean[m] = row.mean + row.rest;
  if (p.rstd != nullptr) p.rstd[m] = rstd;
}

template <class T, class R, class WT, int E, int V>
__global__ void __launch_bounds__(kMaxThreads, V * sizeof(R) == 16 && sizeof(R) == 2 ? 2 : 1)
    forward_rows(const __grid_constant__ LayerNormForwardParams p) {
  const int N = static_cast<int>(p.cols);
  RowSums<2> sum_over_row;

  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.y; base < p.rows; base += step) {
    const int64_t m = base + threadIdx.y;
    const bool exists = m < p.rows;
    const auto own =
        E > kShortSlice ? Columns<E, V>::of_warps(exists ? N : 0) : Columns<E, V>::of_lanes(exists ? N : 0);

    // Load.
    const Slice<R, E, V> x = load_sum<T, R>(p, m, 0, own);

    // Mean.
    float mean = 0.0f;
    if (p.centred) {
      float total[1] = {sum(x)};
      sum_over_row(total);
      mean = total[0] / static_cast<float>(N);
    }

    // Variance.
    float sums[2] = {};
    add_centred(sums, x, mean, own);
    sum_over_row(sums);
    const Moments row = moments(p, mean, sums);
    const float rstd = rsqrtf(row.variance + p.eps);

    // Normalise.
    store_normalised<T, WT>(p, m, 0, x, row, rstd, own);
    if (exists) store_statistics(p, m, row, rstd);
  }
}

template <class T, class R, class WT, int V>
__global__ void __launch_bounds__(kMaxThreads) forward_long_rows(const __grid_constant__ LayerNormForwardParams p) {
  constexpr int E = kLongSlice<V>, kTile = E * kMaxThreads;
  const int64_t N = p.cols;
  RowSums<2> sum_over_row;
  const void* normalised = p.residual != nullptr ? p.sum : p.input;
  auto own_of = [&](int64_t tile) { return Columns<E, V>::of_warps(N - tile < kTile ? N - tile : kTile); };

  for (int64_t m = blockIdx.x; m < p.rows; m += gridDim.x) {
    // Mean.
    float total[1] = {};
    for (int64_t tile = 0; tile < N; tile += kTile) total[0] += sum(load_sum<T, R>(p, m, tile, own_of(tile)));
    sum_over_row(total);
    const float mean = p.centred ? total[0] / static_cast<float>(N) : 0.0f;

    // Variance.
    float sums[2] = {};
    for (int64_t tile = 0; tile < N; tile += kTile) {
      Slice<R, E, V> x;
      x.reload(at<R>(normalised, m * N + tile), own_of(tile));
      add_centred(sums, x, mean, own_of(tile));
    }
    sum_over_row(sums);
    const Moments row = moments(p, mean, sums);
    const float rstd = rsqrtf(row.variance + p.eps);

    // Normalise.
    for (int64_t tile = 0; tile < N; tile += kTile) {
      Slice<R, E, V> x;
      x.reload(at<R>(normalised, m * N + tile), own_of(tile));
      store_normalised<T, WT>(p, m, tile, x, row, rstd, own_of(tile));
    }
    store_statistics(p, m, row, rstd);
  }
}

// Grid (slabs, rows) -> the mean of a slab, and the sums of what is left about it and of the squares of that.
template <class T, class R, int V>
__global__ void __launch_bounds__(kMaxThreads) statistics_of_slabs(const __grid_constant__ LayerNormForwardParams p) {
  constexpr int E = kSlice<V>, kSlab = kLongestRow<V>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSlab, rest = p.cols - column;
  const auto own = Columns<E, V>::of_warps(rest < kSlab ? rest : kSlab);
  RowSums<2> sum_over_slab;

  const Slice<R, E, V> x = load_sum<T, R>(p, blockIdx.y, column, own);
  float mean = 0.0f;
  if (p.centred) {
    float total[1] = {sum(x)};
    sum_over_slab(total);
    mean = total[0] / static_cast<float>(own.count);
  }
  float sums[2] = {};
  add_centred(sums, x, mean, own);
  sum_over_slab(sums);
  if (threadIdx.x > 0) return;
  float* slab = p.workspace + 3 * (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x);
  slab[0] = mean;
  slab[1] = sums[0];
  slab[2] = sums[1];
}

// Grid as above, the last slab of the last row first: it is the one that L2 still holds.
template <class T, class R, class WT, int V>
__global__ void __launch_bounds__(kMaxThreads) normalise_slabs(const __grid_constant__ LayerNormForwardParams p) {
  constexpr int E = kSlice<V>, kSlab = kLongestRow<V>;
  const int slabs = static_cast<int>(gridDim.x), slab = slabs - 1 - static_cast<int>(blockIdx.x);
  const int64_t m = gridDim.y - 1 - blockIdx.y;
  const int64_t column = static_cast<int64_t>(slab) * kSlab, rest = p.cols - column;
  const auto own = Columns<E, V>::of_warps(rest < kSlab ? rest : kSlab);
  Slice<R, E, V> x;
  x.load_once(at<R>(p.residual != nullptr ? p.sum : p.input, m * p.cols + column), own);

  // Moments of the row about the mean of its first slab, from those of its slabs about their own means.
  const float* statistics = p.workspace + 3 * m * slabs;
  const float mean = statistics[0];
  RowSums<2> sum_over_slabs;
  float sums[2] = {};
  for (int k = static_cast<int>(threadIdx.x); k < slabs; k += blockDim.x) {
    const int64_t left = p.cols - k * int64_t{kSlab};
    const float length = static_cast<float>(left < kSlab ? left : kSlab);
    const float *of_slab = statistics + 3 * k, apart = of_slab[0] - mean, off = of_slab[1];
    sums[0] += length * apart + off;
    sums[1] += of_slab[2] + apart * (length * apart + 2.0f * off);
  }
  sum_over_slabs(sums);
  const Moments row = moments(p, mean, sums);
  const float rstd = rsqrtf(row.variance + p.eps);

  store_normalised<T, WT>(p, m, column, x, row, rstd, own);
  if (slab == 0) store_statistics(p, m, row, rstd);
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

// How many slabs each of `rows` long rows is cut into: 1, not at all, where there are enough rows for the device.
template <int V>
int64_t slabs_of(int64_t rows, int64_t cols, int device) {
  const bool cut = cols > kLongestRow<V> && rows < kFewRows * multiprocessors(device);
  return cut ? (cols + kLongestRow<V> - 1) / kLongestRow<V> : 1;
}

}  // namespace

int64_t layer_norm_forward_workspace(int64_t rows, int64_t cols, int device) {
  const int64_t slabs = slabs_of<1>(rows, cols, device);  // single elements make the most
  return slabs > 1 ? 3 * rows * slabs : 0;
}

void layer_norm_forward(const LayerNormForwardParams& params, Stream stream) {
  if (params.rows == 0) return;
  const LayerNormForwardParams p = normalised(params);
  dispatch_norm(kName, p, [&](auto t, auto r, auto wt) {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    using WT = typename decltype(wt)::type;
    const bool packets = in_packets<T>(p.cols, p.input, p.residual, p.weight, p.bias, p.sum, p.output);
    dispatch_width<T>(packets, [&](auto width) {
      constexpr int V = decltype(width)::value;
      const dim3 block = block_for<V>(p.cols);
      const size_t shared = RowSums<2>::floats(block.x * block.y) * sizeof(float);
      const int64_t slabs = slabs_of<V>(p.rows, p.cols, current_device());
      if (slabs > 1) {
        if (p.workspace_size < 3 * p.rows * slabs)
          throw std::invalid_argument(std::string("[") + kName + "] workspace: expected at least " +
                                      std::to_string(3 * p.rows * slabs) + " elements, but got " +
                                      std::to_string(p.workspace_size));
        const dim3 grid(static_cast<unsigned>(slabs), static_cast<unsigned>(p.rows));
        launch(kName, statistics_of_slabs<T, R, V>, grid, block, shared, stream, p);
        launch(kName, normalise_slabs<T, R, WT, V>, grid, block, shared, stream, p);
        return;
      }
      auto* kernel = p.cols <= kShortRow        ? forward_rows<T, R, WT, kShortSlice, V>
                     : p.cols <= kLongestRow<V> ? forward_rows<T, R, WT, kSlice<V>, V>
                                                : forward_long_rows<T, R, WT, V>;
      const int64_t groups = (p.rows + block.y - 1) / block.y;
      const dim3 grid(static_cast<unsigned>(groups < INT32_MAX ? groups : INT32_MAX));
      launch(kName, kernel, grid, block, shared, stream, p);
    });
  });
}

}  // namespace torchweld::cuda
