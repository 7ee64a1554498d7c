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

// sum = dS @ key, for the 64 queries of a step and 64 columns from `column` on.
template <class T, int D>
__device__ __forceinline__ void begin_dquery(float (&sum)[8][4], uint32_t scores, uint32_t keys, int column) {
  using Keys = typename KeysShape<D>::Own;
  const uint64_t a = ScoresPanels<D>::descriptor(scores), b = Keys::descriptor(keys + column / 64 * Keys::kPanelBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < KeysShape<D>::kRows / 16; ++step)
    ptx::wgmma<T, 64, true, true>(sum, ScoresPanels<D>::rows(a, step), Keys::rows(b, step), step > 0);
  ptx::wgmma_commit();
}

// dquery_accumulator += sum, for queries from i0 on. All additions of a row share one address.
template <int D>
__device__ __forceinline__ void add_dquery(const Backward& p, const Head& head, const float (&sum)[8][4], int i0,
                                           int column) {
  const int c = column + lane_column(), left = static_cast<int>(p.dim) - c;  // columns from this lane's first one on
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = i0 + warp() % 4 * 16 + lane_row() + 8 * half;
    if (i >= head.queries) continue;
    float* to = p.dquery_accumulator + (head.statistics_begin + i) * p.accumulator_width() + c;
    if (static_cast<int>(p.dim) == D) {
#pragma unroll
      for (int n = 0; n < 8; ++n) ptx::add_pair(to + 8 * n, sum[n][2 * half], sum[n][2 * half + 1]);
    } else {
#pragma unroll
      for (int n = 0; n < 8; ++n)
        if (8 * n < left) ptx::add_pair(to + 8 * n, sum[n][2 * half], sum[n][2 * half + 1]);
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
  const uint32_t scores = AlignedMemory::begin();
  BackwardMemory<Shape> memory(kQuery ? scores + static_cast<uint32_t>(offsetof(AtomicMemory<D>, memory)) : scores);
  memory.pipeline.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    const Head head(p, ptx::opaque(b), first_head);
    BackwardRows<T> rows(p, head, j0, end);
    if (start < last) {
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[0], rows.key, j0);
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[1], rows.value, j0);
    }
    typename Shape::Pipeline::Producer producer(memory.pipeline);
    int64_t statistics_begin = head.statistics_begin;
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      TileStream<T, D, Shape::kStreamed> queries(rows.query, start), doutputs(rows.doutput, start);
      auto load_statistics = [&](int slot, const float2* statistics, int i0) {
        const int i = i0 + static_cast<int>(threadIdx.x);
        if (static_cast<int>(threadIdx.x) < Shape::kStreamed)
          ptx::cp_async<8>(memory.statistics_of(slot) + threadIdx.x * 8, statistics + statistics_begin + i,
                           i < head.queries ? 8 : 0);
      };
#pragma unroll 1
      for (int i0 = start; i0 < last; i0 += Shape::kStreamed) {
        producer.load([&](int slot) {
          queries.load(memory.item(slot), i0);
          load_statistics(slot, p.softmax_statistics, i0);
        });
        producer.load([&](int slot) {
          doutputs.load(memory.item(slot), i0);
          load_statistics(slot, p.gradient_statistics, i0);
        });
      }
      rows.query.base += p.query_strides.head;  // every head has the same rows
      rows.doutput.base += p.doutput_strides.head;
      statistics_begin += p.total_q;
    }
    producer.finish();
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const int row = (warpgroup() - 1) * 64, row0 = j0 + row + warp() % 4 * 16;
  float dkey[1][kKey ? D / 8 : 1][4] = {}, dvalue[1][kValue ? D / 8 : 1][4] = {};
  if (start < last) {
    RingPair<Shape::kSlots> items{};
    memory.pipeline.wait(items.first);
    float s[1][NT][4], ds[1][NT][4];
    RegisterOperand<NT> probabilities, dscores;
    uint32_t odd = 0;  // step % 2
    auto multiply = [&](const Head& head, int i0) {
      const auto query = items.first, doutput = items.second();
      const ScorePositions<true> positions{head, kPlain || kQuery ? row0 : ptx::opaque(row0), i0};
      const bool unmasked = head.all_visible(i0, Shape::kStreamed, j0 + row, 64);
      const bool uses_dropout = !kPlain && p.dropout.seed != nullptr;
      const uint32_t queries = memory.item(query.slot), doutputs = memory.item(doutput.slot);
      auto statistics_of = [&](int slot) {
        return [columns = memory.statistics_of(slot) + ptx::opaque(threadIdx.x) % 4 * 16](int, int n, int e) {
          return column_statistics(columns, n, e);
        };
      };
      auto softmax = statistics_of(query.slot), gradient = statistics_of(doutput.slot);
      auto begin_values = [&] {
        probabilities.template from_accumulator<T>(s);
        ptx::wgmma_fence();
        if constexpr (kValue) begin_columns<T, D>(dvalue, probabilities, doutputs);
        ptx::wgmma_commit();
      };

      // Products.
      memory.pipeline.wait(query);
      begin_own_rows<T, D>(s, memory, 0, row, queries);
      memory.pipeline.wait(doutput);
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
        if constexpr (kQuery) {
          store_panel(scores + odd * ScoresPanels<D>::kBytes, row + warp() % 4 * 16, dscores);
          ptx::fence_proxy_async();
        }
      }
      if constexpr (kValue && !kPlain) {
        if (uses_dropout) apply_dropout(s, keep);
        begin_values();
      }
      auto begin_keys = [&] {
        ptx::wgmma_fence();
        if constexpr (kKey) begin_columns<T, D>(dkey, dscores, queries);
        ptx::wgmma_commit();
      };
      if constexpr (kQuery) sync_consumers<Shape::kGroups>();
      // Each warpgroup takes half of the columns of dquery (D 128), or every other tile (D 64), and adds them beside
      // the product for dkey.
      const auto half = static_cast<uint32_t>(warpgroup() - 1);
      const int column = D > 64 ? static_cast<int>(64 * half) : 0;
      if (kQuery && (D > 64 || odd == half)) {
        float sum[8][4];
        begin_dquery<T, D>(sum, scores + odd * ScoresPanels<D>::kBytes, memory.own[0], column);
        begin_keys();
        ptx::wgmma_wait<1>();
        add_dquery<D>(p, head, sum, i0, column);
        ptx::wgmma_wait<0>();
      } else {
        if constexpr (kKey) begin_keys();
        ptx::wgmma_wait<0>();
      }
      memory.pipeline.release(query);
      memory.pipeline.release(doutput);
      items.next();
      if constexpr (kQuery) odd ^= 1;
    };
#pragma unroll 1
    for (int h = 0; h < group; ++h) {
      const Head head(p, ptx::opaque(b), first_head + h);
#pragma unroll 1
      for (int i0 = start; i0 < last; i0 += Shape::kStreamed) multiply(head, i0);
    }
  }
  // Made again: the numbers of `own` that only this needs would take registers from the loop.
  store_dkey_dvalue<T, kPlain>(p, Head(p, ptx::opaque(b), first_head), row0, dkey, dvalue);
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
