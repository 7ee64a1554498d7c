// Layer norm backward: the main kernel. backward.cu explains its modes and launches it.
#pragma once

#include "cuda/norm/layer_norm.cuh"

namespace torchweld::cuda::norm {
namespace {

constexpr int kSlice = 8, kSharedSlice = 32;  // columns per lane: modes registers and slab; mode shared
constexpr int kRowThreads = 256;              // modes registers and slab
constexpr int kMaxThreads = 512;              // mode shared, sums_of_rows
constexpr int kRegisterColumns = kSlice * kRowThreads, kSlab = kRegisterColumns;
constexpr int kSharedColumns = kSharedSlice * kMaxThreads;

// How many blocks of kRowThreads a multiprocessor holds at once. Registers are the limit.
constexpr int row_blocks(bool vectorized) { return vectorized ? 3 : 2; }

enum class Mode { registers, shared, slab };

struct Backward : LayerNormBackwardParams {
  float* row_sums;  // [M, 2] mean(g) and mean(g * xhat) of each row, mode slab only
  float* parts;     // [M, parts_per_row, 2] the sums of each part
  int64_t parts_per_row;
  bool weights;  // true if weight gradients are wanted
};

// What a lane reads of one row. Past the last row it is zeros.
template <class T, class R, int E, int V>
struct Row {
  Slice<R, E, V> x;
  Slice<T, E, V> doutput;
  float mean = 0.0f, rstd = 0.0f;

  // Row m, whose first column is element `start`.
  __device__ __forceinline__ void load(const Backward& p, int64_t m, int64_t end, int64_t start, Columns<E, V> own) {
    if (m >= end) own.count = 0;
    x.load_once(at<R>(p.input, start), own);
    doutput.load_once(at<T>(p.doutput, start), own);
    mean = m < end && p.mean != nullptr ? p.mean[m] : 0.0f;
    rstd = m < end ? p.rstd[m] : 0.0f;
  }

  __device__ __forceinline__ float xhat(int c, int i) const { return (x.vectors[c][i] - mean) * rstd; }
};

template <class WT, int V>
__device__ __forceinline__ Vector<WT, V> load_weight(const Backward& p, int64_t column, bool exists) {
  Vector<WT, V> w{};
  if (p.weight == nullptr) {
    w.set([](int) { return 1.0f; });
  } else if (exists) {
    w.load(at<WT>(p.weight, column));
  }
  return w;
}

// A lane's weight gradients: E columns, in registers or in shared memory. In shared memory each warp has its own range,
// where the vectors of 4 columns of neighbouring lanes are neighbours: no bank conflicts.
template <int E, bool kShared>
struct WeightGradients {
  static constexpr int kBytes = 2 * E * sizeof(float);  // per lane
  float registers[2][kShared ? 1 : E] = {};
  float4* memory;  // memory that the block's rows share, or this lane's first vector

  __device__ __forceinline__ explicit WeightGradients(int offset)
      : memory(reinterpret_cast<float4*>(shared_memory) + offset) {
    if constexpr (kShared) {
      memory += threadIdx.x / kWarpSize * (kWarpSize * E / 2) + threadIdx.x % kWarpSize;
#pragma unroll
      for (int q = 0; q < E / 2; ++q) memory[q * kWarpSize] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }

  // Adds v[0..4) to elements e..e + 3.
  __device__ __forceinline__ void add(int which, int e, const float* v) {
    if constexpr (kShared) {
      float4& total = memory[(which * E + e) / 4 * kWarpSize];
      total = make_float4(total.x + v[0], total.y + v[1], total.z + v[2], total.w + v[3]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) registers[which][e + k] += v[k];
    }
  }

  __device__ __forceinline__ float get(int which, int e) const {
    if constexpr (kShared) return reinterpret_cast<const float*>(memory + (which * E + e) / 4 * kWarpSize)[e % 4];
    return registers[which][e];
  }

  // Sums over the rows that the block processes at once, in order. Returns true in the lanes that hold the result.
  __device__ __forceinline__ bool sum_over_rows() {
    if constexpr (kShared) return true;
    const int lanes = static_cast<int>(blockDim.x), rows = static_cast<int>(blockDim.y);
    const int thread = static_cast<int>(threadIdx.y) * lanes + static_cast<int>(threadIdx.x);

    // The rows of one warp.
#pragma unroll
    for (int k = 0; k < 2 * E; ++k)
      for (int offset = lanes; offset < kWarpSize; offset *= 2)
        registers[k / E][k % E] += __shfl_xor_sync(0xffffffffu, registers[k / E][k % E], offset);

    // Team after team. A team is a row, or a warp of several rows.
    const int team = lanes < kWarpSize ? thread / kWarpSize : static_cast<int>(threadIdx.y);
    const int teams = lanes < kWarpSize ? rows * lanes / kWarpSize : rows;
    const bool member = lanes >= kWarpSize || thread % kWarpSize < lanes;
    float* sums = reinterpret_cast<float*>(memory) + threadIdx.x;
    for (int t = 0; t < teams; ++t) {
      if (t == team && member) {
#pragma unroll
        for (int k = 0; k < 2 * E; ++k) {
          if (t > 0) registers[k / E][k % E] += sums[k * lanes];
          if (t + 1 < teams) sums[k * lanes] = registers[k / E][k % E];
        }
      }
      __syncthreads();
    }
    return team == teams - 1 && member;
  }
};

template <class T, class R, class WT, int E, int V, Mode kMode>
__global__ void __launch_bounds__(kMode == Mode::shared ? kMaxThreads : kRowThreads,
                                  kMode == Mode::shared ? 1 : row_blocks(V > 1))
    backward_rows(const __grid_constant__ Backward p) {
  // Grid (slabs, ranges of rows): rows [begin, end), blockDim.y at a time, and columns from `column` on.
  const int64_t begin = p.rows * blockIdx.y / gridDim.y, end = p.rows * (blockIdx.y + 1) / gridDim.y;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSlab;
  const int64_t count = kMode == Mode::slab && p.cols - column > kSlab ? kSlab : p.cols - column;
  const auto own = kMode == Mode::registers ? Columns<E, V>::of_lanes(count) : Columns<E, V>::of_warps(count);
  RowSums<2> sum_over_row;
  WeightGradients<E, kMode == Mode::shared> gradients(sum_over_row.floats(blockDim.x * blockDim.y) / 4);

  // Weight. Loaded once where registers allow it, else with every row.
  constexpr bool kKeepWeight = kMode != Mode::shared && V > 1 && sizeof(WT) == sizeof(T);
  Vector<WT, V> kept[kKeepWeight ? E / V : 1];
#pragma unroll
  for (int c = 0; c < (kKeepWeight ? E / V : 0); ++c)
    kept[c] = load_weight<WT, V>(p, column + own.first(c), own.has(c));
  auto weight = [&](int c) {
    if constexpr (kKeepWeight) return kept[c];
    return load_weight<WT, V>(p, column + own.first(c), own.has(c));
  };

  const float share = 1.0f / static_cast<float>(p.cols);
  constexpr bool kPrefetch = V > 1 && sizeof(R) == 2;  // other instances lack the registers
  Row<T, R, E, V> row, next;
  const int64_t ahead = blockDim.y * p.cols;
  int64_t start = (begin + threadIdx.y) * p.cols + column;  // of the row, kept: a product of 64 bits costs five
  if (kPrefetch) next.load(p, begin + threadIdx.y, end, start, own);
  for (int64_t base = begin; base < end; base += blockDim.y, start += ahead) {
    const int64_t m = base + threadIdx.y;

    // Load.
    const DropoutMask<E, V> mask(p.dropout, m, column, own);
    if (kPrefetch) {
      row = next;
      next.load(p, m + blockDim.y, end, start + ahead, own);
    } else {
      row.load(p, m, end, start, own);
    }

    // Sums over the row, and weight gradients. Missing columns have doutput = 0.
    float sums[2] = {};
    constexpr int kStep = V < 4 ? 4 : V;  // whole vectors of x and of the weight gradients
#pragma unroll
    for (int first = 0; first < E; first += kStep) {
      float dweight[kStep], dbias[kStep];
#pragma unroll
      for (int c = 0; c < kStep / V; ++c) {
        const Vector<WT, V> w = weight(first / V + c);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float d = row.doutput.vectors[first / V + c][i], xhat = row.xhat(first / V + c, i);
          const float g = d * (w[i] + p.weight_offset);
          sums[0] += g;
          sums[1] += g * xhat;
          dweight[c * V + i] = d * xhat;
          dbias[c * V + i] = d;
        }
      }
#pragma unroll
      for (int e = 0; e < kStep; e += 4) {
        gradients.add(0, first + e, dweight + e);
        gradients.add(1, first + e, dbias + e);
      }
    }
    if (p.dinput == nullptr && p.dx == nullptr) continue;
    constexpr int kDepth = E / V > 2 && V > 1 ? 2 : E / V;  // vectors of dsum in flight
    Slice<R, kDepth * V, V> dsum{};
    if (p.dsum != nullptr) dsum.load_once(at<R>(p.dsum, start), {own.start, own.stride, m < end ? own.count : 0});
    if constexpr (kMode == Mode::slab) {
      sums[0] = p.row_sums[2 * m];
      sums[1] = p.row_sums[2 * m + 1];
    } else {
      sum_over_row(sums);
      sums[0] = p.mean != nullptr ? sums[0] * share : 0.0f;
      sums[1] *= share;
    }

    // Input gradient.
    if (m >= end) continue;
#pragma unroll
    for (int c = 0; c < E / V; ++c) {
      if (!own.has(c)) continue;
      const Vector<WT, V> w = weight(c);
      float v[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float g = row.doutput.vectors[c][i] * (w[i] + p.weight_offset);
        v[i] = (g - sums[0] - row.xhat(c, i) * sums[1]) * row.rstd + dsum.vectors[c % kDepth][i];
      }
      const int64_t first = start + own.first(c);
      if (p.dinput != nullptr) {
        Vector<R, V> dinput;
        dinput.set([&](int i) { return v[i]; });
        dinput.store(at<R>(p.dinput, first));
      }
      if (p.dx != nullptr) {
        Vector<T, V> dx;
        dx.set([&](int i) { return mask(c * V + i, v[i], p.dropout); });
        dx.store(at<T>(p.dx, first));
      }
      if (c + kDepth < E / V && p.dsum != nullptr && own.has(c + kDepth))
        dsum.vectors[c % kDepth].load_once(at<R>(p.dsum, start) + own.first(c + kDepth));
    }
  }

  // Partials.
  if (!p.weights || !gradients.sum_over_rows()) return;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float* partial = p.partial + (blockIdx.y * 2 + which) * p.cols + column;
#pragma unroll
    for (int c = 0; c < E / V; ++c) {
      if (!own.has(c)) continue;
      Vector<float, V> v;
      v.set([&](int i) { return gradients.get(which, c * V + i); });
      v.store(partial + own.first(c));
    }
  }
}

}  // namespace
}  // namespace torchweld::cuda::norm
