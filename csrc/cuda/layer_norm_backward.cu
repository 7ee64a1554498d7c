// Layer norm backward.
//
//   xhat = (x - mean) * rstd     g = doutput * weight     dinput = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum
//   dweight = sum over rows of doutput * xhat             dbias = sum over rows of doutput
//
// backward_rows, by the length of the row:
//   registers (N <= 2048)  a block owns a range of rows, a lane 8 columns; x and doutput of the next rows are on their way
//                          while these are worked on; the weight gradients add up in registers over all rows of the block.
//   shared (N <= 16384)    as above with 32 columns per lane and the weight gradients in shared memory.
//   slab (longer rows)     sums_of_rows first, then a block owns 2048 columns of a range of rows.
// Each block leaves its weight gradients as one fp32 partial of the workspace, and reduce_partials adds these up in order:
// no atomics, the same bits on every run. x and doutput are read once (by a slab twice): 3 values per element, 4 with
// dsum, and 16 bytes per column and block for the partials, which stay in L2.
// Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450.

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/layer_norm.cuh"

namespace torchweld::cuda {
namespace {

constexpr const char* kName = "layer_norm_backward";
constexpr int kSlice = 8, kSharedSlice = 32;      // columns per lane: of registers and slab; of shared
constexpr int kRowThreads = 256, kRowBlocks = 3;  // of registers and slab; blocks per multiprocessor
constexpr int kMaxThreads = 512;                  // of shared and sums_of_rows
constexpr int kRegisterColumns = kSlice * kRowThreads, kSlab = kRegisterColumns;
constexpr int kSharedColumns = kSharedSlice * kMaxThreads;

enum class Mode { registers, shared, slab };

struct Backward : LayerNormBackwardParams {
  float* row_sums;  // [M, 2] mean(g) and mean(g * xhat) of each row, slabs only
  bool weights;     // whether weight gradients are wanted
};

// What a lane has read of one row; nothing (zeros) of a row past the end.
template <class T, int E, int V>
struct Row {
  Slice<T, E, V> x, doutput;
  float mean = 0.0f, rstd = 0.0f;

  __device__ __forceinline__ void load(const Backward& p, int64_t m, int64_t end, int64_t column,
                                       Columns<E, V> own) {
    if (m >= end) own.count = 0;
    x.load_once(at<T>(p.input, m * p.cols + column), own);
    doutput.load_once(at<T>(p.doutput, m * p.cols + column), own);
    mean = m < end ? p.mean[m] : 0.0f;
    rstd = m < end ? p.rstd[m] : 0.0f;
  }

  __device__ __forceinline__ float xhat(int c, int i) const { return (x.runs[c][i] - mean) * rstd; }
};

template <class WT, int V>
__device__ __forceinline__ Run<WT, V> load_weight(const Backward& p, int64_t column, bool exists) {
  Run<WT, V> w{};
  if (p.weight == nullptr) {
    w.set([](int) { return 1.0f; });
  } else if (exists) {
    w.load(at<WT>(p.weight, column));
  }
  return w;
}

// A lane's weight gradients: E columns, in registers or in shared memory, where the packets of a warp are neighbours.
template <int E, bool kShared>
struct WeightGradients {
  float registers[2][kShared ? 1 : E] = {};
  float4* packets;

  __device__ __forceinline__ explicit WeightGradients(int offset)
      : packets(reinterpret_cast<float4*>(shared_memory) + offset + threadIdx.x) {
    if constexpr (kShared) {
      for (int q = 0; q < E / 2; ++q) packets[q * blockDim.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }

  // v[0..4) to elements e..e + 3.
  __device__ __forceinline__ void add(int which, int e, const float* v) {
    if constexpr (kShared) {
      float4& total = packets[(which * E + e) / 4 * blockDim.x];
      total = make_float4(total.x + v[0], total.y + v[1], total.z + v[2], total.w + v[3]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) registers[which][e + k] += v[k];
    }
  }

  __device__ __forceinline__ float get(int which, int e) const {
    if constexpr (kShared) return reinterpret_cast<const float*>(packets + (which * E + e) / 4 * blockDim.x)[e % 4];
    return registers[which][e];
  }

  // Sums over the rows that the block works on at once, in their order; true in the lanes that end up with them.
  __device__ __forceinline__ bool sum_over_rows() {
    if constexpr (!kShared) {
      const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
      const int thread = static_cast<int>(threadIdx.y) * lanes + lane;
      const int team = lanes < kWarp ? thread / kWarp : static_cast<int>(threadIdx.y);
      const int teams = lanes < kWarp ? static_cast<int>(blockDim.y) * lanes / kWarp : static_cast<int>(blockDim.y);
      const bool member = lanes >= kWarp || thread % kWarp < lanes;
      float* memory = reinterpret_cast<float*>(packets - lane) + lane;
#pragma unroll
      for (int k = 0; k < 2 * E; ++k)
        for (int offset = lanes; offset < kWarp; offset *= 2)
          registers[k / E][k % E] += __shfl_xor_sync(0xffffffffu, registers[k / E][k % E], offset);
      for (int t = 0; t < teams; ++t) {
        if (t == team && member) {
#pragma unroll
          for (int k = 0; k < 2 * E; ++k) {
            if (t > 0) registers[k / E][k % E] += memory[k * lanes];
            memory[k * lanes] = registers[k / E][k % E];
          }
        }
        __syncthreads();
      }
      return team == teams - 1 && member;
    }
    return true;
  }
};

template <class T, class WT, int E, int V, Mode kMode>
__global__ void __launch_bounds__(kMode == Mode::shared ? kMaxThreads : kRowThreads,
                                  kMode == Mode::shared ? 1 : kRowBlocks) backward_rows(const __grid_constant__ Backward p) {
  // Grid (slabs, row blocks): rows [begin, end), blockDim.y at a time; columns from `column`.
  const int64_t begin = p.rows * blockIdx.y / gridDim.y, end = p.rows * (blockIdx.y + 1) / gridDim.y;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kSlab;
  const int64_t count = kMode == Mode::slab && p.cols - column > kSlab ? kSlab : p.cols - column;
  const auto own = kMode == Mode::registers ? Columns<E, V>::of_lanes(count) : Columns<E, V>::of_warps(count);
  RowSums<2> sum_over_row;
  WeightGradients<E, kMode == Mode::shared> gradients(sum_over_row.floats(blockDim.x * blockDim.y) / 4);

  // Weight: once where registers are left for it, else with every row.
  constexpr bool kKeepWeight = kMode != Mode::shared && V > 1 && sizeof(WT) == sizeof(T);
  Run<WT, V> kept[kKeepWeight ? E / V : 1];
#pragma unroll
  for (int c = 0; c < (kKeepWeight ? E / V : 0); ++c) kept[c] = load_weight<WT, V>(p, column + own.first(c), own.has(c));
  auto weight = [&](int c) {
    if constexpr (kKeepWeight) return kept[c];
    return load_weight<WT, V>(p, column + own.first(c), own.has(c));
  };

  constexpr bool kAhead = V > 1 && sizeof(T) == 2;  // elsewhere it would take too many registers
  Row<T, E, V> row, next;
  if (kAhead) next.load(p, begin + threadIdx.y, end, column, own);
  for (int64_t base = begin; base < end; base += blockDim.y) {
    const int64_t m = base + threadIdx.y;

    // Load.
    if (kAhead) {
      row = next;
      next.load(p, m + blockDim.y, end, column, own);
    } else {
      row.load(p, m, end, column, own);
    }

    constexpr bool kEarly = kMode != Mode::shared && V > 1;
    Slice<T, kEarly ? E : V, V> dsum{};
    if (kEarly && p.dsum != nullptr) {
      dsum.load_once(at<T>(p.dsum, m * p.cols + column), {own.start, own.stride, m < end ? own.count : 0});
    }

    // Sums over the row, and weight gradients. Columns that do not exist have doutput = 0.
    float sums[2] = {};
    constexpr int kStep = V < 4 ? 4 : V;  // whole runs, and whole packets of the weight gradients
#pragma unroll
    for (int first = 0; first < E; first += kStep) {
      float dweight[kStep], dbias[kStep];
#pragma unroll
      for (int c = 0; c < kStep / V; ++c) {
        const Run<WT, V> w = weight(first / V + c);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float d = row.doutput.runs[first / V + c][i], xhat = row.xhat(first / V + c, i);
          sums[0] += d * w[i];
          sums[1] += d * w[i] * xhat;
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
    if (p.dinput == nullptr) continue;
    if constexpr (kMode == Mode::slab) {
      sums[0] = p.row_sums[2 * m];
      sums[1] = p.row_sums[2 * m + 1];
    } else {
      sum_over_row(sums);
      sums[0] /= static_cast<float>(p.cols);
      sums[1] /= static_cast<float>(p.cols);
    }

    // Input gradient.
    if (m >= end) continue;
    T* dinput = at<T>(p.dinput, m * p.cols + column);
#pragma unroll
    for (int c = 0; c < E / V; ++c) {
      if (!own.has(c)) continue;
      const Run<WT, V> w = weight(c);
      Run<T, V> ds = dsum.runs[kEarly ? c : 0], dx;
      if (!kEarly && p.dsum != nullptr) ds.load_once(at<T>(p.dsum, m * p.cols) + own.first(c));
      dx.set([&](int i) {
        const float g = row.doutput.runs[c][i] * w[i];
        return (g - sums[0] - row.xhat(c, i) * sums[1]) * row.rstd + ds[i];
      });
      dx.store(dinput + own.first(c));
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
      Run<float, V> v;
      v.set([&](int i) { return gradients.get(which, c * V + i); });
      v.store(partial + own.first(c));
    }
  }
}

// Of rows that slabs share: mean(g) and mean(g * xhat). Grid -> rows.
template <class T, class WT, int V>
__global__ void __launch_bounds__(kMaxThreads) sums_of_rows(const __grid_constant__ Backward p) {
  constexpr int E = V > 1 ? 16 : 8, kTile = E * kMaxThreads;
  RowSums<2> sum_over_row;
  for (int64_t m = blockIdx.x; m < p.rows; m += gridDim.x) {
    float sums[2] = {};
    for (int64_t tile = 0; tile < p.cols; tile += kTile) {
      const auto own = Columns<E, V>::of_warps(p.cols - tile < kTile ? p.cols - tile : kTile);
      Row<T, E, V> row;
      row.load(p, m, p.rows, tile, own);
#pragma unroll
      for (int c = 0; c < E / V; ++c) {
        const Run<WT, V> w = load_weight<WT, V>(p, tile + own.first(c), own.has(c));
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float g = row.doutput.runs[c][i] * w[i];
          sums[0] += g;
          sums[1] += g * row.xhat(c, i);
        }
      }
    }
    sum_over_row(sums);
    if (threadIdx.x == 0) {
      p.row_sums[2 * m] = sums[0] / static_cast<float>(p.cols);
      p.row_sums[2 * m + 1] = sums[1] / static_cast<float>(p.cols);
    }
  }
}

// dweight and dbias: the sum of the blocks' partials. Grid -> 32 of the 2 * N columns; each of blockDim.y lanes takes its
// share of the partials in order, then the first adds these up in order.
template <class WT>
__global__ void __launch_bounds__(kWarp * kWarp) reduce_partials(const __grid_constant__ Backward p) {
  float* shares = reinterpret_cast<float*>(shared_memory);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float total = 0.0f;
  if (column < 2 * p.cols)
    for (int64_t b = threadIdx.y; b < p.blocks; b += blockDim.y) total += p.partial[b * 2 * p.cols + column];
  shares[threadIdx.y * kWarp + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || column >= 2 * p.cols) return;
  for (unsigned y = 1; y < blockDim.y; ++y) total += shares[y * kWarp + threadIdx.x];
  Run<WT, 1> out;
  out.set([&](int) { return total; });
  void* gradient = column < p.cols ? p.dweight : p.dbias;
  if (gradient != nullptr) out.store(at<WT>(gradient, column % p.cols));
}

// ---- Launch

struct Plan {
  Mode mode;
  dim3 block;
  int64_t slabs, blocks;  // the grid: pieces of a row; ranges of rows
  size_t shared;          // bytes
};

size_t sums_bytes(int64_t threads) { return RowSums<2>::floats(static_cast<int>(threads)) * sizeof(float); }

// `packets`: whether rows can be accessed 16 bytes at a time, as those of Mode::shared must be.
Plan plan_for(int64_t rows, int64_t cols, bool packets, int device) {
  const int64_t processors = multiprocessors(device);
  Plan plan{};
  int64_t resident;  // blocks that a multiprocessor holds at once
  if (cols <= kRegisterColumns) {
    plan.mode = Mode::registers;
    const int lanes = lanes_for(cols, kSlice), threads = lanes * std::max(1, kRowThreads / lanes);
    plan.block = dim3(lanes, threads / lanes);
    plan.shared = sums_bytes(threads) + (plan.block.y > 1 ? 2 * kSlice * sizeof(float) * lanes : 0);
    resident = kRowBlocks * kRowThreads / threads;
  } else {
    plan.mode = Mode::shared;
    const int64_t threads = lanes_for(std::min<int64_t>(cols, kSharedColumns + 1), kSharedSlice);
    plan.block = dim3(static_cast<unsigned>(threads));
    plan.shared = sums_bytes(threads) + 2 * kSharedSlice * sizeof(float) * threads;
    resident = std::min(shared_bytes_per_block(device) / static_cast<int64_t>(plan.shared), kMaxThreads / threads);
  }
  plan.slabs = 1;
  plan.blocks = std::min(processors * resident, std::max(processors, rows / (4 * plan.block.y)));
  if (plan.mode == Mode::shared && (resident == 0 || !packets)) {
    plan.mode = Mode::slab;
    plan.block = dim3(kRowThreads);
    plan.shared = 0;
    plan.slabs = (cols + kSlab - 1) / kSlab;
    if (resident == 0) plan.blocks = kRowBlocks * processors / plan.slabs;
  }
  plan.blocks = std::max<int64_t>(1, std::min(plan.blocks, (rows + plan.block.y - 1) / plan.block.y));
  return plan;
}

// How many blocks of the workspace the row sums take, of rows that may be cut into slabs.
int64_t blocks_of_sums(int64_t rows, int64_t cols) { return cols > kRegisterColumns ? (rows + cols - 1) / cols : 0; }

}  // namespace

int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int device) {
  return (weights ? plan_for(rows, cols, true, device).blocks : 0) + blocks_of_sums(rows, cols);
}

void layer_norm_backward(const LayerNormBackwardParams& params, Stream stream) {
  Backward p{params, nullptr, params.dweight != nullptr || params.dbias != nullptr};
  const int64_t sums = blocks_of_sums(p.rows, p.cols);
  if (p.blocks < sums + p.weights)
    throw std::invalid_argument(std::string("[") + kName + "] partial: expected at least " +
                                std::to_string(sums + p.weights) + " blocks, but got " + std::to_string(p.blocks));
  p.blocks -= sums;
  p.row_sums = p.partial + p.blocks * 2 * p.cols;

  dispatch_types(kName, p.dtype, p.weight_dtype, [&](auto t, auto wt) {
    using T = typename decltype(t)::type;
    using WT = typename decltype(wt)::type;
    const bool packets = in_packets<T>(p.cols, p.doutput, p.dsum, p.input, p.weight, p.dinput, p.partial);
    const Plan plan = plan_for(p.rows, p.cols, packets, current_device());
    const dim3 grid(static_cast<unsigned>(plan.slabs), static_cast<unsigned>(p.weights ? p.blocks : plan.blocks));
    dispatch_width<T>(packets, [&](auto width) {
      constexpr int V = decltype(width)::value;
      if (plan.mode == Mode::slab && p.rows > 0 && p.dinput != nullptr) {
        const dim3 rows(static_cast<unsigned>(std::min<int64_t>(p.rows, INT32_MAX))), block(kMaxThreads);
        launch(kName, sums_of_rows<T, WT, V>, rows, block, sums_bytes(kMaxThreads), stream, p);
      }
      auto* kernel = plan.mode == Mode::slab ? backward_rows<T, WT, kSlice, V, Mode::slab>
                                             : backward_rows<T, WT, kSlice, V, Mode::registers>;
      if constexpr (V > 1) {
        if (plan.mode == Mode::shared) kernel = backward_rows<T, WT, kSharedSlice, V, Mode::shared>;
      }
      launch(kName, kernel, grid, plan.block, plan.shared, stream, p);
    });
    if (!p.weights) return;
    int lanes = 1;
    while (lanes < kWarp && lanes < p.blocks) lanes *= 2;
    const dim3 columns(static_cast<unsigned>((2 * p.cols + kWarp - 1) / kWarp)), block(kWarp, lanes);
    launch(kName, reduce_partials<WT>, columns, block, kWarp * lanes * sizeof(float), stream, p);
  });
}

}  // namespace torchweld::cuda
