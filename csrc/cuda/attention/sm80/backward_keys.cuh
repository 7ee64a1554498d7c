// The kernel backward_keys: the gradients of keys and values (see attention/backward.cuh).
//
// All tiles are transposed: scores^T = key @ query^T has one row per key. So P^T and dS^T are the left operands of both
// gradients without leaving the registers, and row statistics are read by column. A block goes through the query heads
// of its key head one after the other. Above head size 128 the two gradients do not fit the registers together, and a
// block computes one of them.
#pragma once

#include "cuda/attention/backward_keys.cuh"
#include "cuda/attention/sm80/backward.cuh"

namespace torchweld::cuda::attention::sm80 {

// dquery_accumulator += dS @ key, for the tile of queries from i0 on. dS^T of all warps is in shared memory; a warp
// takes 16 queries and a part of the columns.
template <class T, int D, bool kPlain>
__device__ __forceinline__ void add_dquery(const Backward& p, const Head& head,
                                           const BackwardMemory<T, D, kPlain>& memory, int i0) {
  using Shape = BackwardShape<T, D, kPlain>;
  constexpr int kTiles = Shape::kStreamed / 16, kColumns = D * kTiles / Shape::kWarps,
                NT = kColumns > 32 ? 4 : kColumns / 8;
  const int row = warp() % kTiles * 16;
#pragma unroll 1
  for (int column = warp() / kTiles * kColumns, last = column + kColumns; column < last; column += 8 * NT) {
    float sum[1][NT][4] = {};
    multiply_transposed<T, Shape::kStreamed, D, Shape::kRows>(sum, memory.dscores(), row / 8, memory.own[0],
                                                              column / 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + row + lane_row() + 8 * half;
      if (i >= head.queries) continue;
      float* to = p.dquery_accumulator + (head.statistics_begin + i) * p.accumulator_width();
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int c = column + 8 * n + lane_column();
        if (c < p.dim) ptx::add_pair(to + c, sum[0][n][2 * half], sum[0][n][2 * half + 1]);
      }
    }
  }
}

// kKey, kValue, kQuery: which gradients the kernel computes. dkey and dquery share one dS.
template <class T, int D, bool kPlain, bool kKey, bool kValue, bool kQuery>
__global__ void __launch_bounds__(BackwardShape<T, D, kPlain>::kThreads, 2)
    backward_keys(const __grid_constant__ Backward p) {
  if (kReplacedOnHopper<T, D>) return;
  using Shape = BackwardShape<T, D, kPlain>;
  constexpr int MT = Shape::MT, NT = Shape::kStreamed / 8, kThreads = Shape::kThreads;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const int group = static_cast<int>(p.heads / p.kv_heads), b = static_cast<int>(work.head / p.kv_heads);
  const int first_head = static_cast<int>(work.head % p.kv_heads) * group;
  const Head own(p, b, first_head);
  const int j0 = work.tile * Shape::kRows, row0 = j0 + warp() * MT * 16;
  if (j0 >= own.keys) return;

  // The queries that see the block's keys. Every head has the same.
  const int end = j0 + Shape::kRows < own.keys ? j0 + Shape::kRows : own.keys;
  const int start = own.query_begin(j0) / Shape::kStreamed * Shape::kStreamed, last = own.query_end(end);
  const int tiles = start < last ? (last - start + Shape::kStreamed - 1) / Shape::kStreamed : 0;
  const BackwardMemory<T, D, kPlain> memory;
  if (tiles > 0) {
    const BackwardRows<T> rows(p, own, j0, end);
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[0], rows.key, j0);
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[1], rows.value, j0);
  }
  auto load = [&](int step) {
    if (step >= tiles * group) return;
    const Head head(p, b, first_head + step / tiles);
    const BackwardRows<T> rows(p, head, 0, 0);
    const int i0 = start + step % tiles * Shape::kStreamed, i = i0 + static_cast<int>(threadIdx.x);
    load_tile<T, D, Shape::kStreamed, kThreads>(memory.streamed(step, 0), rows.query, i0);
    load_tile<T, D, Shape::kStreamed, kThreads>(memory.streamed(step, 1), rows.doutput, i0);
    if (static_cast<int>(threadIdx.x) < Shape::kStreamed) {
      const int bytes = i < head.queries ? 8 : 0;
      const uint32_t place = threadIdx.x * 8;
      ptx::cp_async<8>(memory.statistics(step, 0) + place, p.softmax_statistics + head.statistics_begin + i, bytes);
      ptx::cp_async<8>(memory.statistics(step, 1) + place, p.gradient_statistics + head.statistics_begin + i, bytes);
    }
  };

  float dkey[MT][kKey ? D / 8 : 1][4] = {}, dvalue[MT][kValue ? D / 8 : 1][4] = {};
  memory.pipeline(tiles * group, load, [&](int step) {
    const Head head(p, b, first_head + step / tiles);
    const int i0 = start + step % tiles * Shape::kStreamed;
    const uint32_t softmax = memory.statistics(step, 0) + opaque_lane() % 4 * 16;
    const uint32_t gradient = softmax + memory.statistics(0, 1) - memory.statistics(0, 0);

    // Products.
    float s[MT][NT][4], ds[MT][NT][4];
    const int here = ptx::opaque(warp()) * MT * 16;  // this warp's rows; opaque like opaque_lane()
    const uint32_t rows = ptx::opaque(memory.own[0] + here * Shape::kRowBytes);
    multiply_rows<T, D, true>(s, rows, memory.streamed(step, 0));
    if constexpr (kKey) multiply_rows<T, D, true>(ds, rows + memory.own[1] - memory.own[0], memory.streamed(step, 1));
    const bool uses_dropout = !kPlain && p.dropout.seed != nullptr;
    DropoutMask<true, MT, NT> keep;
    if (uses_dropout) keep.generate(p.dropout, head.mask_begin, row0, i0);
    if constexpr (kKey)
      subtract_delta(p, ds, uses_dropout, keep, [&](int, int n, int e) { return column_statistics(gradient, n, e); });

    // Probabilities.
    const ScorePositions<true> positions{head, row0, i0};
    const bool unmasked = head.all_visible(i0, Shape::kStreamed, j0, Shape::kRows);
    if constexpr (!kPlain) modify_scores(p, positions, unmasked, s, kKey ? ds : nullptr);
    if (!unmasked) {
      mask_out(positions, s, -infinity());
      if constexpr (kKey) mask_out(positions, ds, 0.0f);
    }
    recompute_probabilities(s, p.scale_log2, [&](int, int n, int e) { return column_statistics(softmax, n, e); });

    // Gradients.
    if constexpr (kKey) {
      for_each<MT, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
      if constexpr (kQuery) store_tile<T>(memory.dscores() + here * Shape::kStreamed * static_cast<int>(sizeof(T)), ds);
      multiply_columns<T, D>(dkey, ds, memory.streamed(step, 0), static_cast<int>(p.dim));
    }
    if constexpr (kValue) {
      if (uses_dropout) apply_dropout(s, keep);
      multiply_columns<T, D>(dvalue, s, memory.streamed(step, 1), static_cast<int>(p.value_dim));
    }
    if constexpr (kQuery) {
      __syncthreads();  // dS is complete; the barrier of the next step precedes the next write
      add_dquery(p, head, memory, i0);
    }
  });

  store_dkey_dvalue<T, kPlain>(p, own, row0, dkey, dvalue);
}

template <class T, int D, bool kPlain>
void launch_keys(Backward p, Stream stream) {
  using Shape = BackwardShape<T, D, kPlain>;
  schedule_keys<T>(p, Shape::kRows);
  if (p.schedule.empty()) return;
  auto run = [&](auto kernel, int bytes) {
    launch("attention_backward", kernel, p.schedule.grid(), dim3(Shape::kThreads), bytes, stream, p);
  };
  constexpr bool kTogether = D <= 128;
  if (p.dkey != nullptr || (kTogether && p.dvalue != nullptr) || p.dquery_accumulator != nullptr) {
    if constexpr (sizeof(T) == 2)
      if (p.dquery_accumulator != nullptr) run(backward_keys<T, D, kPlain, true, kTogether, true>, Shape::kAtomicBytes);
    if (p.dquery_accumulator == nullptr) run(backward_keys<T, D, kPlain, true, kTogether, false>, Shape::kBytes);
  }
  if constexpr (!kTogether)
    if (p.dvalue != nullptr) run(backward_keys<T, D, kPlain, false, true, false>, Shape::kBytes);
}

}  // namespace torchweld::cuda::attention::sm80
