// Layer norm forward: the kernels. forward.cu explains and launches them.
#pragma once

#include "cuda/norm/layer_norm.cuh"
#include "moments.h"

namespace torchweld::cuda::norm {
namespace {

constexpr int kShortRow = 256, kShortSlice = 8, kShortThreads = 256;  // columns, columns per lane, threads per block
constexpr int kFewRows = 2;  // long rows per multiprocessor, below which rows are cut into slabs
constexpr int kWarpRowThreads = 128, kMaxThreads = 512;  // of rows of one warp; most of any row

// Columns per lane of medium rows, and of a tile of long rows. Fewer where every column is an access of its own.
template <int V>
constexpr int kSlice = V > 1 ? 32 : 16;
template <int V>
constexpr int kLongSlice = kSlice<V> / 2;
template <int V>
constexpr int kLongestRow = kSlice<V> * kMaxThreads;

// Row m from `column` on, as normalised: the input, or its sum with the residual. The sum is rounded to R and stored
// first, so the backward sees the numbers that were normalised.
template <class T, class R, int E, int V>
__device__ __forceinline__ Slice<R, E, V> load_sum(const LayerNormForwardParams& p, int64_t m, int64_t column,
                                                   const Columns<E, V>& own) {
  const int64_t start = m * p.cols + column;
  const DropoutMask<E, V> mask(p.dropout, m, column, own);
  Slice<T, E, V> x;
  x.load_once(at<T>(p.input, start), own);
  if constexpr (std::is_same_v<T, R>)
    if (p.residual == nullptr) return x;
  Slice<R, E, V> s;
  constexpr int kDepth = s.kVectors >= 4 ? s.kVectors / 2 : s.kVectors;  // all at once would take too many registers
#pragma unroll
  for (int first = 0; first < s.kVectors; first += kDepth) {
    Vector<R, V> r[kDepth] = {};
#pragma unroll
    for (int c = 0; c < kDepth; ++c)
      if (own.has(first + c)) r[c].load_once(at<R>(p.residual, start) + own.first(first + c));
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
      Vector<R, V>& run = s.vectors[first + c];
      run.set([&](int i) { return r[c][i] + mask((first + c) * V + i, x.vectors[first + c][i], p.dropout); });
      if (own.has(first + c)) run.store(at<R>(p.sum, start) + own.first(first + c));
    }
  }
  return s;
}

// The first number of row m, about. The mean is summed about it: in a row of nearly equal numbers the sum itself would
// be rounded by more than they deviate.
template <class T, class R>
__device__ __forceinline__ float pivot(const LayerNormForwardParams& p, int64_t m) {
  Vector<T, 1> x;
  Vector<R, 1> residual = {};
  x.reload(at<T>(p.input, m * p.cols));
  if (p.residual != nullptr) residual.reload(at<R>(p.residual, m * p.cols));
  return x[0] + residual[0];
}

template <class T, int E, int V>
__device__ __forceinline__ float sum_about(float pivot, const Slice<T, E, V>& x, const Columns<E, V>& own) {
  float total = 0.0f;
#pragma unroll
  for (int c = 0; c < x.kVectors; ++c) {
    if (!own.has(c)) continue;  // a missing column is not a zero
#pragma unroll
    for (int i = 0; i < V; ++i) total += x.vectors[c][i] - pivot;
  }
  return total;
}

// Adds to `sums` those of x - mean and (x - mean)^2.
template <class T, int E, int V>
__device__ __forceinline__ void add_centred(float (&sums)[2], const Slice<T, E, V>& x, float mean,
                                            const Columns<E, V>& own) {
#pragma unroll
  for (int c = 0; c < x.kVectors; ++c) {
    if (!own.has(c)) continue;  // a missing column is not a zero
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float centred = x.vectors[c][i] - mean;
      sums[0] += centred;
      sums[1] += centred * centred;
    }
  }
}

// The moments of a row, from the sums of add_centred().
__device__ __forceinline__ Moments moments(const LayerNormForwardParams& p, float mean, const float (&sums)[2]) {
  const float count = static_cast<float>(p.cols);
  return p.centred ? corrected(mean, sums[0], sums[1], count) : Moments{0.0f, 0.0f, sums[1] / count};
}

template <class T, class R, int E, int V>
__device__ __forceinline__ void store_normalised(const LayerNormForwardParams& p, int64_t m, int64_t column,
                                                 const Slice<R, E, V>& x, const Moments& row, float rstd,
                                                 const Columns<E, V>& own) {
  const float rest = p.centred ? row.rest * rstd : 0.0f;  // rstd may be infinite
  T* output = at<T>(p.output, m * p.cols + column);
#pragma unroll
  for (int c = 0; c < x.kVectors; ++c) {
    if (!own.has(c)) continue;
    Vector<float, V> w, b;
    w.set([](int) { return 1.0f; });
    b.set([](int) { return -0.0f; });  // -0 leaves every sum as it is
    if (p.weight != nullptr) w = load_parameters<T, V>(p.weight, p.weight_dtype, column + own.first(c));
    if (p.bias != nullptr) b = load_parameters<T, V>(p.bias, p.weight_dtype, column + own.first(c));
    Vector<T, V> y;
    y.set([&](int i) { return ((x.vectors[c][i] - row.mean) * rstd - rest) * (w[i] + p.weight_offset) + b[i]; });
    y.store(output + own.first(c));
  }
}

__device__ __forceinline__ void store_statistics(const LayerNormForwardParams& p, int64_t m, const Moments& row,
                                                 float rstd) {
  if (threadIdx.x > 0) return;
  if (p.mean != nullptr) p.mean[m] = row.mean + row.rest;
  if (p.rstd != nullptr) p.rstd[m] = rstd;
}

template <class T, class R, int E, int V>
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
      const float near = exists ? pivot<T, R>(p, m) : 0.0f;
      float total[1] = {sum_about(near, x, own)};
      sum_over_row(total);
      mean = near + total[0] / static_cast<float>(N);
    }

    // Variance.
    float sums[2] = {};
    add_centred(sums, x, mean, own);
    sum_over_row(sums);
    const Moments row = moments(p, mean, sums);
    const float rstd = rsqrtf(row.variance + p.eps);

    // Normalise.
    store_normalised<T>(p, m, 0, x, row, rstd, own);
    if (exists) store_statistics(p, m, row, rstd);
  }
}

template <class T, class R, int V>
__global__ void __launch_bounds__(kMaxThreads) forward_long_rows(const __grid_constant__ LayerNormForwardParams p) {
  constexpr int E = kLongSlice<V>, kTile = E * kMaxThreads;
  const int64_t N = p.cols;
  RowSums<2> sum_over_row;
  const void* normalised = p.residual != nullptr ? p.sum : p.input;
  auto own_of = [&](int64_t tile) { return Columns<E, V>::of_warps(N - tile < kTile ? N - tile : kTile); };

  for (int64_t m = blockIdx.x; m < p.rows; m += gridDim.x) {
    // Mean.
    const float near = pivot<T, R>(p, m);
    float total[1] = {};
    for (int64_t tile = 0; tile < N; tile += kTile)
      total[0] += sum_about(near, load_sum<T, R>(p, m, tile, own_of(tile)), own_of(tile));
    sum_over_row(total);
    const float mean = p.centred ? near + total[0] / static_cast<float>(N) : 0.0f;

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
      store_normalised<T>(p, m, tile, x, row, rstd, own_of(tile));
    }
    store_statistics(p, m, row, rstd);
  }
}

// Grid (slabs, rows) -> the mean of a slab, and the sums of x - mean and (x - mean)^2.
template <class T, class R, int V>
__global__ void __launch_bounds__(kMaxThreads) statistics_of_slabs(const __grid_constant__ LayerNormForwardParams p) {
  constexpr int E = kSlice<V>, kSlab = kLongestRow<V>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSlab, rest = p.cols - column;
  const auto own = Columns<E, V>::of_warps(rest < kSlab ? rest : kSlab);
  RowSums<2> sum_over_slab;

  const Slice<R, E, V> x = load_sum<T, R>(p, blockIdx.y, column, own);
  float mean = 0.0f;
  if (p.centred) {
    const float near = pivot<T, R>(p, blockIdx.y);
    float total[1] = {sum_about(near, x, own)};
    sum_over_slab(total);
    mean = near + total[0] / static_cast<float>(own.count);
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

// Grid (slabs, rows), the last slab of the last row first: L2 still holds it.
template <class T, class R, int V>
__global__ void __launch_bounds__(kMaxThreads) normalise_slabs(const __grid_constant__ LayerNormForwardParams p) {
  constexpr int E = kSlice<V>, kSlab = kLongestRow<V>;
  const int slabs = static_cast<int>(gridDim.x), slab = slabs - 1 - static_cast<int>(blockIdx.x);
  const int64_t m = gridDim.y - 1 - blockIdx.y;
  const int64_t column = static_cast<int64_t>(slab) * kSlab, rest = p.cols - column;
  const auto own = Columns<E, V>::of_warps(rest < kSlab ? rest : kSlab);
  Slice<R, E, V> x;
  x.load_once(at<R>(p.residual != nullptr ? p.sum : p.input, m * p.cols + column), own);

  // The moments of the row about the mean of its first slab, from those of its slabs about their own means.
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

  store_normalised<T>(p, m, column, x, row, rstd, own);
  if (slab == 0) store_statistics(p, m, row, rstd);
}

}  // namespace
}  // namespace torchweld::cuda::norm
