// The kernel backward_bias: the gradient of a bias (see attention/backward.cuh).
//
// Grid: tiles of dbias, keys fastest. Along a dimension that bias is broadcast along, a block goes through all indices
// in order and sums dS in registers.
#pragma once

#include "cuda/attention/backward_bias.cuh"
#include "cuda/attention/sm80/backward_queries.cuh"

namespace torchweld::cuda::attention::sm80 {

template <class T, int D>
__global__ void __launch_bounds__(BackwardShape<T, D, false>::kThreads, 2)
    backward_bias(const __grid_constant__ Backward p) {
  if (kReplacedOnHopper<T, D>) return;
  using Shape = BackwardShape<T, D, false>;
  constexpr int MT = Shape::MT, NT = Shape::kStreamed / 8, kThreads = Shape::kThreads;
  using Tile = BiasTile<Shape::kRows, Shape::kStreamed>;
  static_assert(sizeof(typename Tile::Sums) <= Shape::kBytes);
  const Tile tile(p, blockIdx.x);
  float sum[MT][NT][4] = {};
  const BackwardMemory<T, D, false> memory;
  tile.for_each_score([&](const Head& head, int i0, int j0) {
    const VisibleKeys<1> visible(head, i0, Shape::kRows);
    const BackwardRows<T> rows(p, head, visible.begin, visible.end);
    const int row0 = i0 + warp() * MT * 16;
    const RowStatistics<MT> statistics(p, head, row0);
    __syncthreads();
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[0], rows.query, i0);
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[1], rows.doutput, i0);
    load_tile<T, D, Shape::kStreamed, kThreads>(memory.streamed(0, 0), rows.key, j0);
    load_tile<T, D, Shape::kStreamed, kThreads>(memory.streamed(0, 1), rows.value, j0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    float ds[MT][NT][4];
    compute_dscores<T, D, false>(p, head, statistics, memory, 0, i0, row0, j0, false, ds);
    for_each<MT, NT>([&](int m, int n, int e) { sum[m][n][e] += ds[m][n][e]; });
  });
  __syncthreads();
  Tile::leave(memory.own[0], warp() * MT * 16, sum);
  __syncthreads();
  tile.template store<kThreads>(memory.own[0], static_cast<int>(threadIdx.x));
}

template <class T, int D>
void launch_bias(Backward p, Stream stream) {
  using Shape = BackwardShape<T, D, false>;
  p.vectorized = reads_vectorized<T>(p);
  const dim3 grid = BiasTile<Shape::kRows, Shape::kStreamed>::grid(p);
  if (grid.x == 0) return;
  launch("attention_backward", backward_bias<T, D>, grid, dim3(Shape::kThreads), Shape::kBytes, stream, p);
}

}  // namespace torchweld::cuda::attention::sm80
