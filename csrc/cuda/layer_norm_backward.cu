// Layer norm backward.
//
//   xhat = (x - mean) * rstd     g = doutput * weight     dinput = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum
//   dweight = sum over rows of doutput * xhat             dbias = sum over rows of doutput
//
// backward_rows, by the length of the row:
//   registers (N <= 2048)  a block owns a range of rows, a lane 8 columns; 16-bit x and doutput of the next rows are on
//                          their way meanwhile; the weight gradients add up in registers over all rows of the block.
//   shared (N <= 16384)    as above with 32 columns per lane and the weight gradients in shared memory.
//   slab (longer rows)     sums_of_rows first, then a block owns 2048 columns of a range of rows.
// Each block leaves its weight gradients as one fp32 partial of the workspace, and reduce_partials adds these up in
// order: no atomics, the same bits on every run. x and doutput are read once (by slabs twice): 3 values per element, 4
// with dsum, and 16 bytes per column and block for the partials, which stay in L2.
// Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450.

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/layer_norm_backward.cuh"

namespace torchweld::cuda {
namespace {

constexpr const char* kName = "layer_norm_backward";

// Of rows that slabs share: mean(g) and mean(g * xhat). Grid -> rows.
template <class T, class WT, int V>
__global__ void __launch_bounds__(kMaxThreads) sums_of_rows(const __grid_constant__ Backward p) {
  constexpr int E = V > 1 ? 16 : 8, kTile = E * kMaxThreads;
  RowSums<2> sum_over_row;
  const float offset = p.weight != nullptr ? p.weight_offset : 0.0f;
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
          const float g = row.doutput.runs[c][i] * (w[i] + offset);
          sums[0] += g;
          sums[1] += g * row.xhat(c, i);
        }
      }
    }
    sum_over_row(sums);
    if (threadIdx.x == 0) {
      p.row_sums[2 * m] = p.mean != nullptr ? sums[0] / static_cast<float>(p.cols) : 0.0f;
      p.row_sums[2 * m + 1] = sums[1] / static_cast<float>(p.cols);
    }
  }
}

// dweight and dbias: the sum of the blocks' partials. Grid -> 32 of the 2 * N columns; each of blockDim.y lanes takes
// its share of the partials in order, then the first adds these up in order.
template <class WT>
__global__ void __launch_bounds__(kWarp* kWarp) reduce_partials(const __grid_constant__ Backward p) {
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
    plan.shared = sums_bytes(threads) + (plan.block.y > 1 ? WeightGradients<kSlice, false>::kBytes * lanes : 0);
    resident = row_blocks(packets) * kRowThreads / threads;
  } else {
    plan.mode = Mode::shared;
    const int64_t threads = lanes_for(std::min<int64_t>(cols, kSharedColumns + 1), kSharedSlice);
    plan.block = dim3(static_cast<unsigned>(threads));
    plan.shared = sums_bytes(threads) + WeightGradients<kSharedSlice, true>::kBytes * threads;
    resident = std::min(shared_bytes_per_block(device) / static_cast<int64_t>(plan.shared), kMaxThreads / threads);
  }
  plan.slabs = 1;
  plan.blocks = std::min(processors * resident, std::max(processors, rows / (4 * plan.block.y)));
  if (plan.mode == Mode::shared && (resident == 0 || !packets)) {
    plan.mode = Mode::slab;
    plan.block = dim3(kRowThreads);
    plan.shared = 0;
    plan.slabs = (cols + kSlab - 1) / kSlab;
    plan.blocks = 2 * row_blocks(packets) * processors / plan.slabs;
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
  if (params.dropout.seed != nullptr || params.sum_dtype != params.dtype)
    throw std::invalid_argument(std::string("[") + kName + "] no dropout and no residual of another dtype on CUDA");
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
    p.blocks = p.weights ? std::min(p.blocks, plan.blocks) : plan.blocks;
    const dim3 grid(static_cast<unsigned>(plan.slabs), static_cast<unsigned>(p.blocks));
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
