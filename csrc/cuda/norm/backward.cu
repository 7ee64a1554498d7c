// Layer norm and RMS norm, backward.
//
//   xhat = (x - mean) * rstd     g = doutput * weight     dinput = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum
//   dx = dropout(dinput)         dweight = sum over rows of doutput * xhat         dbias = sum over rows of doutput
//
// RMS norm has mean = mean(g) = 0. weight stands for weight + weight_offset.
//
// backward_rows has three modes, by the length of a row:
//   registers (N <= 2048)  A block owns a range of rows, a lane 8 columns. 16-bit x and doutput of the next rows are
//                          loaded ahead. Weight gradients accumulate in registers over the rows of the block.
//   shared (N <= 16384)    A lane owns 32 columns, and weight gradients accumulate in shared memory.
//   slab (longer rows)     sums_of_rows and means_of_rows run first, with several blocks per row where rows are few.
//   Then
//                          a block owns 2048 columns of a range of rows.
// Each block writes its weight gradients to the workspace as one fp32 partial, and reduce_partials adds the partials in
// order: no atomics, the same bits on every run. x and doutput are read once (slab: twice): 3 values per element, 4
// with dsum, and 16 bytes per column and block for the partials, which stay in L2. Ba, Kiros, Hinton: Layer
// Normalization, arXiv:1607.06450.

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/norm/backward.cuh"

namespace torchweld::cuda::norm {
namespace {

constexpr const char* kName = "layer_norm_backward";
constexpr int64_t kPartsPerProcessor = 4;  // of sums_of_rows

// Mode slab: the sums of g and g * xhat over a row. Grid (parts of a row, rows): part k takes tiles k, k + parts, ...
template <class T, class R, int V>
__global__ void __launch_bounds__(kMaxThreads) sums_of_rows(const __grid_constant__ Backward p) {
  constexpr int E = V > 1 ? 16 : 8, kTile = E * kMaxThreads;
  RowSums<2> sum_over_row;
  for (int64_t m = blockIdx.y; m < p.rows; m += gridDim.y) {
    float sums[2] = {};
    for (int64_t tile = blockIdx.x * int64_t{kTile}; tile < p.cols; tile += gridDim.x * int64_t{kTile}) {
      const auto own = Columns<E, V>::of_warps(p.cols - tile < kTile ? p.cols - tile : kTile);
      Row<T, R, E, V> row;
      row.load(p, m, p.rows, m * p.cols + tile, own);
#pragma unroll
      for (int c = 0; c < E / V; ++c) {
        Vector<float, V> w;
        w.set([](int) { return 1.0f; });
        if (p.weight != nullptr && own.has(c)) w = load_parameters<T, V>(p.weight, p.weight_dtype, tile + own.first(c));
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float g = row.doutput.vectors[c][i] * (w[i] + p.weight_offset);
          sums[0] += g;
          sums[1] += g * row.xhat(c, i);
        }
      }
    }
    sum_over_row(sums);
    if (threadIdx.x == 0) {
      float* part = p.parts + 2 * (m * gridDim.x + blockIdx.x);
      part[0] = sums[0];
      part[1] = sums[1];
    }
  }
}

// mean(g) and mean(g * xhat), from the sums of the parts in order. Grid -> rows, one warp each.
__global__ void __launch_bounds__(kWarpSize) means_of_rows(const __grid_constant__ Backward p) {
  const int64_t m = blockIdx.x;
  float sums[2] = {};
  for (int64_t k = threadIdx.x; k < p.parts_per_row; k += kWarpSize) {
    sums[0] += p.parts[2 * (m * p.parts_per_row + k)];
    sums[1] += p.parts[2 * (m * p.parts_per_row + k) + 1];
  }
  const float g = group_sum(sums[0], kWarpSize), gx = group_sum(sums[1], kWarpSize);
  if (threadIdx.x > 0) return;
  p.row_sums[2 * m] = p.mean != nullptr ? g / static_cast<float>(p.cols) : 0.0f;
  p.row_sums[2 * m + 1] = gx / static_cast<float>(p.cols);
}

// dweight and dbias: the sum of the blocks' partials. Grid -> 32 of the 2 * N columns. Each of blockDim.y threads adds
// its share of the partials in order, then the first adds these sums in order.
template <class WT>
__global__ void __launch_bounds__(kWarpSize* kWarpSize) reduce_partials(const __grid_constant__ Backward p) {
  float* shares = reinterpret_cast<float*>(shared_memory);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  float total = 0.0f;
  if (column < 2 * p.cols)
    for (int64_t b = threadIdx.y; b < p.blocks; b += blockDim.y) total += p.partial[b * 2 * p.cols + column];
  shares[threadIdx.y * kWarpSize + threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || column >= 2 * p.cols) return;
  for (unsigned y = 1; y < blockDim.y; ++y) total += shares[y * kWarpSize + threadIdx.x];
  Vector<WT, 1> out;
  out.set([&](int) { return total; });
  void* gradient = column < p.cols ? p.dweight : p.dbias;
  if (gradient != nullptr) out.store(at<WT>(gradient, column % p.cols));
}

// ---- Launch

struct Plan {
  Mode mode;
  dim3 block;
  int64_t slabs, blocks;  // the grid: slabs of a row, ranges of rows
  size_t shared;          // bytes
};

size_t sums_bytes(int64_t threads) { return RowSums<2>::floats(static_cast<int>(threads)) * sizeof(float); }

// vectorized: rows can be accessed 16 bytes at a time, which Mode::shared needs.
Plan plan_for(int64_t rows, int64_t cols, bool vectorized, int device) {
  const int64_t processors = multiprocessors(device);
  Plan plan{};
  int64_t resident;  // blocks that a multiprocessor holds at once
  if (cols <= kRegisterColumns) {
    plan.mode = Mode::registers;
    const int lanes = lanes_for(cols, kSlice), threads = lanes * std::max(1, kRowThreads / lanes);
    plan.block = dim3(lanes, threads / lanes);
    plan.shared = sums_bytes(threads) + (plan.block.y > 1 ? WeightGradients<kSlice, false>::kBytes * lanes : 0);
    resident = row_blocks(vectorized) * kRowThreads / threads;
  } else {
    plan.mode = Mode::shared;
    const int64_t threads = lanes_for(std::min<int64_t>(cols, kSharedColumns + 1), kSharedSlice);
    plan.block = dim3(static_cast<unsigned>(threads));
    plan.shared = sums_bytes(threads) + WeightGradients<kSharedSlice, true>::kBytes * threads;
    resident = std::min(shared_bytes_per_block(device) / static_cast<int64_t>(plan.shared), kMaxThreads / threads);
  }
  plan.slabs = 1;
  plan.blocks = std::min(processors * resident, std::max(processors, rows / (4 * plan.block.y)));
  if (plan.mode == Mode::shared && (resident == 0 || !vectorized)) {
    plan.mode = Mode::slab;
    plan.block = dim3(kRowThreads);
    plan.shared = 0;
    plan.slabs = (cols + kSlab - 1) / kSlab;
    plan.blocks = 2 * row_blocks(vectorized) * processors / plan.slabs;
  }
  plan.blocks = std::max<int64_t>(1, std::min(plan.blocks, (rows + plan.block.y - 1) / plan.block.y));
  return plan;
}

// How many blocks share the sums of a row: enough to fill the device where rows are few, at least four tiles each.
int64_t parts_of(int64_t rows, int64_t cols, int device) {
  const int64_t wanted = kPartsPerProcessor * multiprocessors(device) / std::max<int64_t>(rows, 1);
  return std::max<int64_t>(1, std::min(wanted, cols / (4 * 16 * kMaxThreads)));
}

// How many blocks of the workspace hold the sums of rows and parts, in mode slab.
int64_t blocks_of_sums(int64_t rows, int64_t cols, int device) {
  return cols > kRegisterColumns ? (rows * (1 + parts_of(rows, cols, device)) + cols - 1) / cols : 0;
}

}  // namespace
}  // namespace torchweld::cuda::norm

namespace torchweld::cuda {

int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int device) {
  using namespace norm;
  return (weights ? plan_for(rows, cols, true, device).blocks : 0) + blocks_of_sums(rows, cols, device);
}

void layer_norm_backward(const LayerNormBackwardParams& params, Stream stream) {
  using namespace norm;
  const int device = current_device();
  Backward p{with_defaults(params), nullptr, nullptr, parts_of(params.rows, params.cols, device),
             params.dweight != nullptr || params.dbias != nullptr};
  const int64_t sums = blocks_of_sums(p.rows, p.cols, device);
  if (p.blocks < sums + p.weights)
    throw std::invalid_argument(std::string("[") + kName + "] partial: expected at least " +
                                std::to_string(sums + p.weights) + " blocks, but got " + std::to_string(p.blocks));
  p.blocks -= sums;
  p.row_sums = p.partial + p.blocks * 2 * p.cols;
  p.parts = p.row_sums + 2 * p.rows;

  const auto run = [&](auto t, auto r, auto wt) {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    using WT = typename decltype(wt)::type;
    const bool vectorized = can_vectorize<T>(p.cols, p.doutput, p.dsum, p.input, p.weight, p.dinput, p.dx, p.partial);
    const Plan plan = plan_for(p.rows, p.cols, vectorized, device);
    p.blocks = p.weights ? std::min(p.blocks, plan.blocks) : plan.blocks;
    const dim3 grid(static_cast<unsigned>(plan.slabs), static_cast<unsigned>(p.blocks));
    dispatch_width<T>(vectorized, [&](auto width) {
      constexpr int V = decltype(width)::value;
      if (plan.mode == Mode::slab && p.rows > 0 && (p.dinput != nullptr || p.dx != nullptr)) {
        const dim3 parts(static_cast<unsigned>(p.parts_per_row),
                         static_cast<unsigned>(std::min<int64_t>(p.rows, 65535)));
        launch(kName, sums_of_rows<T, R, V>, parts, dim3(kMaxThreads), sums_bytes(kMaxThreads), stream, p);
        launch(kName, means_of_rows, dim3(static_cast<unsigned>(p.rows)), dim3(kWarpSize), 0, stream, p);
      }
      auto* kernel = plan.mode == Mode::slab ? backward_rows<T, R, WT, kSlice, V, Mode::slab>
                                             : backward_rows<T, R, WT, kSlice, V, Mode::registers>;
      if constexpr (V > 1) {
        if (plan.mode == Mode::shared) kernel = backward_rows<T, R, WT, kSharedSlice, V, Mode::shared>;
      }
      launch(kName, kernel, grid, plan.block, plan.shared, stream, p);
    });
    if (!p.weights) return;
    int lanes = 1;
    while (lanes < kWarpSize && lanes < p.blocks) lanes *= 2;
    const dim3 columns(static_cast<unsigned>((2 * p.cols + kWarpSize - 1) / kWarpSize)), block(kWarpSize, lanes);
    launch(kName, reduce_partials<WT>, columns, block, kWarpSize * lanes * sizeof(float), stream, p);
  };
  dispatch_norm(kName, p, [&](auto t, auto r) { p.weight_dtype == p.dtype ? run(t, r, t) : run(t, r, Tag<float>{}); });
}

}  // namespace torchweld::cuda
