// The kernel backward_queries on Hopper: as in sm80/, with wgmma.
#pragma once

#include "cuda/attention/backward_queries.cuh"
#include "cuda/attention/sm90/backward.cuh"

namespace torchweld::cuda::attention::sm90 {

template <int D, bool kPlain>
using QueriesShape = BackwardShape<D, kPlain && D <= 128 ? 128 : 64>;

template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(QueriesShape<D, kPlain>::kThreads, 1)
    backward_queries(const __grid_constant__ Backward p) {
  using Shape = QueriesShape<D, kPlain>;
  constexpr int NT = Shape::kStreamed / 8;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kRows;
  if (i0 >= head.queries) return;

  const VisibleKeys<Shape::kStreamed> visible(head, i0, Shape::kRows);
  const int steps = visible.steps;
  BackwardMemory<Shape> memory(AlignedMemory::begin());
  memory.pipeline.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    const BackwardRows<T> rows(p, head, visible.begin, visible.end);
    if (steps > 0) {
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[0], rows.query, i0);
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[1], rows.doutput, i0);
    }
    TileStream<T, D, Shape::kStreamed> keys(rows.key, visible.start), values(rows.value, visible.start);
    typename Shape::Pipeline::Producer producer(memory.pipeline);
    const int beyond = visible.start + steps * Shape::kStreamed;
#pragma unroll 1
    for (int first = visible.start; first < beyond; first += Shape::kStreamed) {
      producer.load([&](int slot) { keys.load(memory.item(slot), first); });
      producer.load([&](int slot) { values.load(memory.item(slot), first); });
    }
    producer.finish();
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const int row = (warpgroup() - 1) * 64, row0 = i0 + row + warp() % 4 * 16;
  float dquery[1][D / 8][4] = {}, dslopes[1][2] = {};
  if (steps > 0) {
    RingPair<Shape::kSlots> items{};
    memory.pipeline.wait(items.first);
    const RowStatistics<1> statistics(p, head, row0);
    float s[1][NT][4], ds[1][NT][4];
    RegisterOperand<NT> dscores;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int j0 = visible.start + step * Shape::kStreamed;
      const ScorePositions<false> positions{head, kPlain ? row0 : ptx::opaque(row0), j0};
      const bool unmasked = head.all_visible(i0 + row, 64, j0, Shape::kStreamed);
      const auto key = items.first, value = items.second();
      items.next();
      const uint32_t keys = memory.item(key.slot);
      auto softmax = [&](int m, int, int e) { return statistics.softmax[m][e / 2]; };
      auto gradient = [&](int m, int, int e) { return statistics.gradient[m][e / 2]; };

      // Products.
      begin_own_rows<T, D>(s, memory, 0, row, keys);
      memory.pipeline.wait(value);
      begin_own_rows<T, D>(ds, memory, 1, row, memory.item(value.slot));

      // Gradients of scores.
      DropoutMask<false, 1, NT> keep;
      if constexpr (kPlain) {
        ptx::wgmma_wait<1>();
        if (!unmasked) mask_out(positions, s, -infinity());
        recompute_probabilities(s, p.scale_log2, softmax);
        if (step + 1 < steps)
          memory.pipeline.wait(items.first);  // waits here so that the probabilities overlap dP: see wait()
        ptx::wgmma_wait<0>();
        subtract_delta(p, ds, false, keep, gradient);
        if (!unmasked) mask_out(positions, ds, 0.0f);
      } else {
        ptx::wgmma_wait<0>();
        const bool uses_dropout = p.dropout.seed != nullptr;
        if (uses_dropout) keep.generate(p.dropout, head.mask_begin, row0, j0);
        subtract_delta(p, ds, uses_dropout, keep, gradient);
        modify_scores(p, positions, unmasked, s, ds, p.dquery != nullptr);
        if (!unmasked) {
          mask_out(positions, s, -infinity());
          mask_out(positions, ds, 0.0f);
        }
        recompute_probabilities(s, p.scale_log2, softmax);
        if (step + 1 < steps) memory.pipeline.wait(items.first);
      }
      memory.pipeline.release(value);
      for_each<1, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
      if (!kPlain && p.row_dslopes != nullptr) add_dslopes(positions, ds, dslopes);

      // dquery.
      dscores.template from_accumulator<T>(ds);
      ptx::wgmma_fence();
      begin_columns<T, D>(dquery, dscores, keys);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      memory.pipeline.release(key);
    }
  }
  if (p.dquery != nullptr) store_dquery<T>(p, head, row0, dquery);
  if (!kPlain && p.row_dslopes != nullptr) store_dslopes(p, head, row0, dslopes);
}

template <class T, int D, bool kPlain>
void launch_queries(const Backward& params, Stream stream) {
  using Shape = QueriesShape<D, kPlain>;
  attention::launch_queries<T>(params, Shape::kRows, backward_queries<T, D, kPlain>, Shape::kThreads, Shape::kBytes,
                               stream);
}

}  // namespace torchweld::cuda::attention::sm90
