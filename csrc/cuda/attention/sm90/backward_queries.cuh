// The gradient of queries on Hopper: sm80/backward_queries.cuh with the products of wgmma.
#pragma once

#include "cuda/attention/sm80/backward_queries.cuh"
#include "cuda/attention/sm90/backward.cuh"

namespace torchweld::cuda {

template <int D, bool kPlain>
using QueriesShapeSm90 = BackwardShapeSm90<D, kPlain && D <= 128 ? 128 : 64>;

template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(QueriesShapeSm90<D, kPlain>::kThreads, 1)
    differentiate_queries_sm90(const __grid_constant__ Backward p) {
  using Shape = QueriesShapeSm90<D, kPlain>;
  constexpr int NT = Shape::kOthers / 8;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kRows;
  if (i0 >= head.queries) return;

  const SeenKeys<Shape::kOthers> seen(head, i0, Shape::kRows);
  const int steps = seen.steps;
  BackwardMemorySm90<Shape> memory(AlignedMemory::begin());
  memory.ring.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    const BackwardRows<T> rows(p, head, seen.begin, seen.end);
    if (steps > 0) {
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[0], rows.query, i0);
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[1], rows.doutput, i0);
    }
    memory.ring.fill(2 * steps, [&](int item) {
      const Rows<T> others = item % 2 == 0 ? Rows<T>(rows.key) : Rows<T>(rows.value);
      load_tile<T, D, Shape::kOthers, kWarpgroup, typename Shape::Others>(memory.item(item), others,
                                                                          seen.start + item / 2 * Shape::kOthers);
    });
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const int row = (warpgroup() - 1) * 64, row0 = i0 + row + warp() % 4 * 16;
  float dquery[1][D / 8][4] = {}, distances[1][2] = {};
  if (steps > 0) {
    memory.ring.await(0);
    const RowValues<1> values(p, head, row0);
    float s[1][NT][4], ds[1][NT][4];
    Lefts<NT> gradients;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int j0 = seen.start + step * Shape::kOthers;
      const Cells<false> cells{head, row0, j0};
      const bool whole = head.sees_all(i0 + row, 64, j0, Shape::kOthers);
      const uint32_t keys = memory.item(2 * step);
      auto softmax = [&](int m, int, int e) { return values.softmax[m][e / 2]; };
      auto gradient = [&](int m, int, int e) { return values.gradient[m][e / 2]; };

      // Products.
      begin_own_rows<T, D>(s, memory, 0, row, keys);
      memory.ring.await(2 * step + 1);
      begin_own_rows<T, D>(ds, memory, 1, row, memory.item(2 * step + 1));

      // Gradients of scores.
      Kept<false, 1, NT> kept;
      if constexpr (kPlain) {
        ptx::wgmma_wait<1>();
        if (!whole) hide(cells, s, -infinity());
        weigh(s, p.unit, softmax);
        if (step + 1 < steps) memory.ring.await(2 * step + 2);  // here, so that weights are made beside dP: see await
        ptx::wgmma_wait<0>();
        subtract_delta(p, ds, false, kept, gradient);
        if (!whole) hide(cells, ds, 0.0f);
      } else {
        ptx::wgmma_wait<0>();
        const bool drops = p.dropout.seed != nullptr;
        if (drops) kept.draw(p.dropout, head.values, row0, j0);
        subtract_delta(p, ds, drops, kept, gradient);
        modify(p, cells, whole, s, ds, p.dquery != nullptr);
        if (!whole) {
          hide(cells, s, -infinity());
          hide(cells, ds, 0.0f);
        }
        weigh(s, p.unit, softmax);
        if (step + 1 < steps) memory.ring.await(2 * step + 2);
      }
      memory.ring.release(2 * step + 1);
      for_each<1, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
      if (!kPlain && p.distances != nullptr) add_distances(cells, ds, distances);

      // Queries.
      gradients.template take<T>(ds);
      ptx::wgmma_fence();
      begin_columns<T, D>(dquery, gradients, keys);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      memory.ring.release(2 * step);
    }
  }
  if (p.dquery != nullptr) store_queries<T>(p, head, row0, dquery);
  if (!kPlain && p.distances != nullptr) store_distances(p, head, row0, distances);
}

template <class T, int D, bool kPlain>
void launch_queries_sm90(const Backward& params, Stream stream) {
  using Shape = QueriesShapeSm90<D, kPlain>;
  launch_queries<T>(params, Shape::kRows, differentiate_queries_sm90<T, D, kPlain>, Shape::kThreads, Shape::kBytes,
                    stream);
}

}  // namespace torchweld::cuda
