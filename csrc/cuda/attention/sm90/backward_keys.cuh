// The kernel backward_keys on Hopper: as in sm80/, transposed like there, with wgmma.
#pragma once

#include "cuda/attention/backward_keys.cuh"
#include "cuda/attention/sm90/backward.cuh"

namespace torchweld::cuda::attention::sm90 {

template <int D>
using KeysShape = BackwardShape<D, 64>;

// Two tiles of dS^T, from which dquery is computed: the warpgroups write one while the other may still be read.
template <int D>
using ScoresPanels = Panels<64, KeysShape<D>::kRows>;

template <int D>
struct AtomicMemory {
  uint8_t dscores[2][ScoresPanels<D>::kBytes];
  typename KeysShape<D>::Memory memory;
};
template <int D>
constexpr int kAtomicBytes = AlignedMemory::kBytes + static_cast<int>(sizeof(AtomicMemory<D>));

// dquery_accumulator += dS @ key, for 64 queries from i0 on and 64 columns from `column` on.
template <class T, int D>
__device__ __forceinline__ void add_dquery(const Backward& p, const Head& head, uint32_t scores, uint32_t keys, int i0,
                                           int column) {
  using Keys = typename KeysShape<D>::Own;
  float sum[1][8][4];
  const uint64_t a = ScoresPanels<D>::descriptor(scores), b = Keys::descriptor(keys + column / 64 * Keys::kPanelBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < KeysShape<D>::kRows / 16; ++step)
    ptx::wgmma<T, 64, true, true>(sum[0], ScoresPanels<D>::rows(a, step), Keys::rows(b, step), step > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = i0 + warp() % 4 * 16 + lane_row() + 8 * half;
    if (i >= head.queries) continue;
    float* to = p.dquery_accumulator + (head.statistics_begin + i) * p.accumulator_width();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int c = column + 8 * n + lane_column();
      if (c < p.dim) ptx::add_pair(to + c, sum[0][n][2 * half], sum[0][n][2 * half + 1]);
    }
  }
}

// kKey, kValue, kQuery: which gradients the kernel computes.
template <class T, int D, bool kPlain, bool kKey, bool kValue, bool kQuery>
__global__ void __launch_bounds__(KeysShape<D>::kThreads, 1) backward_keys(const __grid_constant__ Backward p) {
  using Shape = KeysShape<D>;
  constexpr int NT = Shape::kStreamed / 8;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const int group = static_cast<int>(p.heads / p.kv_heads), b = static_cast<int>(work.head / p.kv_heads);
  const int first_head = static_cast<int>(work.head % p.kv_heads) * group;
  const Head own(p, b, first_head);
  const int j0 = work.tile * Shape::kRows;
  if (j0 >= own.keys) return;

  // The queries that see the block's keys. Every head has the same.
  const int end = j0 + Shape::kRows < own.keys ? j0 + Shape::kRows : own.keys;
  const int start = own.query_begin(j0) / Shape::kStreamed * Shape::kStreamed, last = own.query_end(end);
  const int tiles = start < last ? (last - start + Shape::kStreamed - 1) / Shape::kStreamed : 0, steps = tiles * group;
  const uint32_t scores = AlignedMemory::begin();
  BackwardMemory<Shape> memory(kQuery ? scores + static_cast<uint32_t>(offsetof(AtomicMemory<D>, memory)) : scores);
  memory.pipeline.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    if (steps > 0) {
      const BackwardRows<T> rows(p, own, j0, end);
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[0], rows.key, j0);
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[1], rows.value, j0);
    }
    memory.pipeline.fill(2 * steps, [&](int item) {
      const Head head(p, b, first_head + item / 2 / tiles);
      const BackwardRows<T> all(p, head, 0, 0);
      const Rows<T> rows = item % 2 == 0 ? Rows<T>(all.query) : Rows<T>(all.doutput);
      const int i0 = start + item / 2 % tiles * Shape::kStreamed, i = i0 + static_cast<int>(threadIdx.x);
      load_tile<T, D, Shape::kStreamed, kWarpgroup, typename Shape::Streamed>(memory.item(item), rows, i0);
      if (static_cast<int>(threadIdx.x) < Shape::kStreamed)
        ptx::cp_async<8>(memory.statistics_of(item) + threadIdx.x * 8,
                         (item % 2 == 0 ? p.softmax_statistics : p.gradient_statistics) + head.statistics_begin + i,
                         i < head.queries ? 8 : 0);
    });
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const int row = (warpgroup() - 1) * 64, row0 = j0 + row + warp() % 4 * 16;
  float dkey[1][kKey ? D / 8 : 1][4] = {}, dvalue[1][kValue ? D / 8 : 1][4] = {};
  if (steps > 0) {
    memory.pipeline.wait(0);
    float s[1][NT][4], ds[1][NT][4];
    RegisterOperand<NT> probabilities, dscores;
    auto multiply = [&](int step, const Head& head, int i0) {
      const ScorePositions<true> positions{head, row0, i0};
      const bool unmasked = head.all_visible(i0, Shape::kStreamed, j0 + row, 64);
      const bool uses_dropout = !kPlain && p.dropout.seed != nullptr;
      const uint32_t queries = memory.item(2 * step), doutputs = memory.item(2 * step + 1);
      auto statistics_of = [&](int item) {
        return [columns = memory.statistics_of(item) + lane_column() * 8](int, int n, int e) {
          return column_statistics(columns, n, e);
        };
      };
      auto softmax = statistics_of(2 * step), gradient = statistics_of(2 * step + 1);
      auto begin_values = [&] {
        probabilities.template from_accumulator<T>(s);
        ptx::wgmma_fence();
        if constexpr (kValue) begin_columns<T, D>(dvalue, probabilities, doutputs);
        ptx::wgmma_commit();
      };

      // Products.
      memory.pipeline.wait(2 * step);
      begin_own_rows<T, D>(s, memory, 0, row, queries);
      memory.pipeline.wait(2 * step + 1);
      if constexpr (kKey) begin_own_rows<T, D>(ds, memory, 1, row, doutputs);

      // Probabilities and dS. A plain call starts the product for dvalue before dP has arrived.
      DropoutMask<true, 1, NT> keep;
      if constexpr (kPlain) {
        ptx::wgmma_wait<kKey ? 1 : 0>();
        if (!unmasked) mask_out(positions, s, -infinity());
        recompute_probabilities(s, p.scale_log2, softmax);
        if constexpr (kValue) begin_values();
        if constexpr (kKey) {
          ptx::wgmma_wait<kValue ? 1 : 0>();
          subtract_delta(p, ds, uses_dropout, keep, gradient);
          if (!unmasked) mask_out(positions, ds, 0.0f);
        }
      } else {
        ptx::wgmma_wait<0>();
        if (uses_dropout) keep.generate(p.dropout, head.mask_begin, row0, i0);
        if constexpr (kKey) subtract_delta(p, ds, uses_dropout, keep, gradient);
        modify_scores(p, positions, unmasked, s, kKey ? ds : nullptr);
        if (!unmasked) {
          mask_out(positions, s, -infinity());
          if constexpr (kKey) mask_out(positions, ds, 0.0f);
        }
        recompute_probabilities(s, p.scale_log2, softmax);
      }
      if constexpr (kKey) {
        for_each<1, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
        dscores.template from_accumulator<T>(ds);
        if constexpr (kQuery) store_panel(scores + step % 2 * ScoresPanels<D>::kBytes, row + warp() % 4 * 16, dscores);
        ptx::wgmma_fence();
        begin_columns<T, D>(dkey, dscores, queries);
        ptx::wgmma_commit();
      }
      if constexpr (kValue && !kPlain) {
        if (uses_dropout) apply_dropout(s, keep);
        begin_values();
      }
      if constexpr (kQuery) {
        // Each warpgroup takes half of the columns (D 128), or every other tile (D 64).
        ptx::fence_proxy_async();
        sync_consumers<Shape::kGroups>();
        const int half = warpgroup() - 1;
        if (D > 64 || step % 2 == half)
          add_dquery<T, D>(p, head, scores + step % 2 * ScoresPanels<D>::kBytes, memory.own[0], i0,
                           D > 64 ? 64 * half : 0);
      }
      ptx::wgmma_wait<0>();
      memory.pipeline.release(2 * step);
      memory.pipeline.release(2 * step + 1);
    };
#pragma unroll 1
    for (int h = 0, step = 0; h < group; ++h) {
      const Head head(p, b, first_head + h);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile, ++step) multiply(step, head, start + tile * Shape::kStreamed);
    }
  }
  store_dkey_dvalue<T, kPlain>(p, own, row0, dkey, dvalue);
}

template <class T, int D, bool kPlain>
void launch_keys(Backward p, Stream stream) {
  using Shape = KeysShape<D>;
  schedule_keys<T>(p, Shape::kRows);
  if (p.schedule.empty()) return;
  auto run = [&](auto kernel, int bytes) {
    launch("attention_backward", kernel, p.schedule.grid(), dim3(Shape::kThreads), bytes, stream, p);
  };
  if constexpr (D <= 128) {
    if (p.dquery_accumulator != nullptr)
      run(backward_keys<T, D, kPlain, true, true, true>, kAtomicBytes<D>);
    else if (p.dkey != nullptr || p.dvalue != nullptr)
      run(backward_keys<T, D, kPlain, true, true, false>, Shape::kBytes);
  } else {
    if (p.dkey != nullptr) run(backward_keys<T, D, kPlain, true, false, false>, Shape::kBytes);
    if (p.dvalue != nullptr) run(backward_keys<T, D, kPlain, false, true, false>, Shape::kBytes);
  }
}

}  // namespace torchweld::cuda::attention::sm90
