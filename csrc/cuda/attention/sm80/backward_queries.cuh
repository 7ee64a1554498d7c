// The kernel backward_queries: the gradient of queries (see attention/backward.cuh).
#pragma once

#include "cuda/attention/backward_queries.cuh"
#include "cuda/attention/sm80/backward.cuh"

namespace torchweld::cuda::attention::sm80 {

// ds = P * (dP - delta) for a tile of keys from j0 on and the block's queries from i0 on, this warp's from row0 on.
// capped: ds is the gradient of the product, before a softcap.
template <class T, int D, bool kPlain, int NT, int MT>
__device__ __forceinline__ void compute_dscores(const Backward& p, const Head& head,
                                                const RowStatistics<MT>& statistics,
                                                const BackwardMemory<T, D, kPlain>& memory, int step, int i0, int row0,
                                                int j0, bool capped, float (&ds)[MT][NT][4]) {
  float s[MT][NT][4];
  multiply_rows<T, D>(s, memory.own_rows(0), memory.streamed(step, 0));
  multiply_rows<T, D>(ds, memory.own_rows(1), memory.streamed(step, 1));
  const bool uses_dropout = !kPlain && p.dropout.seed != nullptr;
  DropoutMask<false, MT, NT> keep;
  if (uses_dropout) keep.generate(p.dropout, head.mask_begin, row0, j0);
  subtract_delta(p, ds, uses_dropout, keep, [&](int m, int, int e) { return statistics.gradient[m][e / 2]; });
  const ScorePositions<false> positions{head, row0, j0};
  using Shape = BackwardShape<T, D, kPlain>;
  const bool unmasked = head.all_visible(i0, Shape::kRows, j0, Shape::kStreamed);
  if constexpr (!kPlain) modify_scores(p, positions, unmasked, s, ds, capped);
  if (!unmasked) {
    mask_out(positions, s, -infinity());
    mask_out(positions, ds, 0.0f);
  }
  recompute_probabilities(s, p.scale_log2, [&](int m, int, int e) { return statistics.softmax[m][e / 2]; });
  for_each<MT, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
}

// Computes dquery, the slope gradients, or both. With a softcap these need gradients of different scores, so the
// launcher asks for one at a time.
template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(BackwardShape<T, D, kPlain>::kThreads, !kPlain && sizeof(T) == 2 && D <= 64 ? 3 : 2)
    backward_queries(const __grid_constant__ Backward p) {
  if (kReplacedOnHopper<T, D>) return;
  using Shape = BackwardShape<T, D, kPlain>;
  constexpr int MT = Shape::MT, NT = Shape::kStreamed / 8, kThreads = Shape::kThreads;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kRows, row0 = i0 + warp() * MT * 16;
  if (i0 >= head.queries) return;

  const VisibleKeys<Shape::kStreamed> visible(head, i0, Shape::kRows);
  const BackwardRows<T> rows(p, head, visible.begin, visible.end);
  const BackwardMemory<T, D, kPlain> memory;
  if (visible.steps > 0) {
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[0], rows.query, i0);
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[1], rows.doutput, i0);
  }
  auto load = [&](int step) {
    if (step >= visible.steps) return;
    load_tile<T, D, Shape::kStreamed, kThreads>(memory.streamed(step, 0), rows.key,
                                                visible.start + step * Shape::kStreamed);
    load_tile<T, D, Shape::kStreamed, kThreads>(memory.streamed(step, 1), rows.value,
                                                visible.start + step * Shape::kStreamed);
  };

  float dquery[MT][D / 8][4] = {}, dslopes[MT][2] = {};
  const RowStatistics<MT> statistics(p, head, row0);
  memory.pipeline(visible.steps, load, [&](int step) {
    const int j0 = visible.start + step * Shape::kStreamed;
    float ds[MT][NT][4];
    compute_dscores<T, D, kPlain>(p, head, statistics, memory, step, i0, row0, j0, p.dquery != nullptr, ds);
    if (p.dquery != nullptr) multiply_columns<T, D>(dquery, ds, memory.streamed(step, 0), static_cast<int>(p.dim));
    if (!kPlain && p.row_dslopes != nullptr) add_dslopes(ScorePositions<false>{head, row0, j0}, ds, dslopes);
  });

  if (p.dquery != nullptr) store_dquery<T>(p, head, row0, dquery);
  if (!kPlain && p.row_dslopes != nullptr) store_dslopes(p, head, row0, dslopes);
}

template <class T, int D, bool kPlain>
void launch_queries(const Backward& p, Stream stream) {
  using Shape = BackwardShape<T, D, kPlain>;
  attention::launch_queries<T>(p, Shape::kRows, backward_queries<T, D, kPlain>, Shape::kThreads, Shape::kBytes, stream);
}

}  // namespace torchweld::cuda::attention::sm80
