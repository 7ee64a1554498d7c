// The gradients of keys and values on Hopper: sm80/backward_keys.cuh with the products of wgmma, all of it
// transposed like there.
#pragma once

#include "cuda/attention/sm80/backward_keys.cuh"
#include "cuda/attention/sm90/backward.cuh"

namespace torchweld::cuda {

template <int D>
using KeysShapeSm90 = BackwardShapeSm90<D, 64>;

// dS^T of all warpgroups, from which dquery is made: two tiles, of which one is written while the other may still be
// read. They come before all else.
template <int D>
using ScoresSm90 = Panels<64, KeysShapeSm90<D>::kRows>;

// dquery_sum += dS @ key: 64 queries from i0, 64 columns from `column` on.
template <class T, int D>
__device__ __forceinline__ void add_queries_sm90(const Backward& p, const Head& head, uint32_t scores, uint32_t keys,
                                                 int i0, int column) {
  using Keys = typename KeysShapeSm90<D>::Own;
  float sum[1][8][4];
  const uint64_t a = ScoresSm90<D>::descriptor(scores), b = Keys::descriptor(keys + column / 64 * Keys::kPanelBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < KeysShapeSm90<D>::kRows / 16; ++step)
    ptx::wgmma<T, 64, true, true>(sum[0], ScoresSm90<D>::rows(a, step), Keys::rows(b, step), step > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = i0 + warp() % 4 * 16 + lane_row() + 8 * half;
    if (i >= head.queries) continue;
    float* to = p.dquery_sum + (head.values + i) * p.sum_width();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int c = column + 8 * n + lane_column();
      if (c < p.dim) ptx::add_pair(to + c, sum[0][n][2 * half], sum[0][n][2 * half + 1]);
    }
  }
}

// kKey, kValue, kQuery: which of the gradients.
template <class T, int D, bool kPlain, bool kKey, bool kValue, bool kQuery>
__global__ void __launch_bounds__(KeysShapeSm90<D>::kThreads, 1)
    differentiate_keys_sm90(const __grid_constant__ Backward p) {
  using Shape = KeysShapeSm90<D>;
  constexpr int NT = Shape::kOthers / 8;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const int group = static_cast<int>(p.heads / p.kv_heads), b = static_cast<int>(work.head / p.kv_heads);
  const int first_head = static_cast<int>(work.head % p.kv_heads) * group;
  const Head own(p, b, first_head);
  const int j0 = work.tile * Shape::kRows;
  if (j0 >= own.keys) return;

  // Which queries see the block's keys: the same of every head.
  const int end = j0 + Shape::kRows < own.keys ? j0 + Shape::kRows : own.keys;
  const int start = own.first(j0) / Shape::kOthers * Shape::kOthers, last = own.last(end);
  const int tiles = start < last ? (last - start + Shape::kOthers - 1) / Shape::kOthers : 0, steps = tiles * group;
  const uint32_t scores = AlignedMemory::begin();
  BackwardMemorySm90<Shape> memory(kQuery ? scores + 2 * ScoresSm90<D>::kBytes : scores);
  memory.ring.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    if (steps > 0) {
      const BackwardRows<T> rows(p, own, j0, end);
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[0], rows.key, j0);
      load_tile<T, D, Shape::kRows, kWarpgroup, typename Shape::Own>(memory.own[1], rows.value, j0);
    }
    memory.ring.fill(2 * steps, [&](int item) {
      const Head head(p, b, first_head + item / 2 / tiles);
      const BackwardRows<T> all(p, head, 0, 0);
      const Rows<T> rows = item % 2 == 0 ? Rows<T>(all.query) : Rows<T>(all.doutput);
      const int i0 = start + item / 2 % tiles * Shape::kOthers, i = i0 + static_cast<int>(threadIdx.x);
      load_tile<T, D, Shape::kOthers, kWarpgroup, typename Shape::Others>(memory.item(item), rows, i0);
      if (static_cast<int>(threadIdx.x) < Shape::kOthers)
        ptx::cp_async<8>(memory.values_of(item) + threadIdx.x * 8,
                         (item % 2 == 0 ? p.softmax : p.gradient) + head.values + i, i < head.queries ? 8 : 0);
    });
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const int row = (warpgroup() - 1) * 64, row0 = j0 + row + warp() % 4 * 16;
  float dkey[1][kKey ? D / 8 : 1][4] = {}, dvalue[1][kValue ? D / 8 : 1][4] = {};
  if (steps > 0) {
    memory.ring.await(0);
    float s[1][NT][4], ds[1][NT][4];
    Lefts<NT> weights, gradients;
    auto multiply = [&](int step, const Head& head, int i0) {
      const Cells<true> cells{head, row0, i0};
      const bool whole = head.sees_all(i0, Shape::kOthers, j0 + row, 64);
      const bool drops = !kPlain && p.dropout.seed != nullptr;
      const uint32_t queries = memory.item(2 * step), doutputs = memory.item(2 * step + 1);
      auto values_of = [&](int item) {
        return [columns = memory.values_of(item) + lane_column() * 8](int, int n, int e) {
          return column_values(columns, n, e);
        };
      };
      auto softmax = values_of(2 * step), gradient = values_of(2 * step + 1);
      auto begin_values = [&] {
        weights.template take<T>(s);
        ptx::wgmma_fence();
        if constexpr (kValue) begin_columns<T, D>(dvalue, weights, doutputs);
        ptx::wgmma_commit();
      };

      // Products.
      memory.ring.await(2 * step);
      begin_own_rows<T, D>(s, memory, 0, row, queries);
      memory.ring.await(2 * step + 1);
      if constexpr (kKey) begin_own_rows<T, D>(ds, memory, 1, row, doutputs);

      // Weights and their gradients; where all that is needed is known, the product of the former goes ahead.
      Kept<true, 1, NT> kept;
      if constexpr (kPlain) {
        ptx::wgmma_wait<kKey ? 1 : 0>();
        if (!whole) hide(cells, s, -infinity());
        weigh(s, p.unit, softmax);
        if constexpr (kValue) begin_values();
        if constexpr (kKey) {
          ptx::wgmma_wait<kValue ? 1 : 0>();
          subtract_delta(p, ds, drops, kept, gradient);
          if (!whole) hide(cells, ds, 0.0f);
        }
      } else {
        ptx::wgmma_wait<0>();
        if (drops) kept.draw(p.dropout, head.values, row0, i0);
        if constexpr (kKey) subtract_delta(p, ds, drops, kept, gradient);
        modify(p, cells, whole, s, kKey ? ds : nullptr);
        if (!whole) {
          hide(cells, s, -infinity());
          if constexpr (kKey) hide(cells, ds, 0.0f);
        }
        weigh(s, p.unit, softmax);
      }
      if constexpr (kKey) {
        for_each<1, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
        gradients.template take<T>(ds);
        if constexpr (kQuery) store_panel(scores + step % 2 * ScoresSm90<D>::kBytes, row + warp() % 4 * 16, gradients);
        ptx::wgmma_fence();
        begin_columns<T, D>(dkey, gradients, queries);
        ptx::wgmma_commit();
      }
      if constexpr (kValue && !kPlain) {
        if (drops) drop(s, kept);
        begin_values();
      }
      if constexpr (kQuery) {
        // Each warpgroup takes half of the columns, or every other tile.
        ptx::fence_proxy_async();
        ptx::barrier_sync(1, Shape::kGroups * kWarpgroup);
        const int half = warpgroup() - 1;
        if (D > 64 || step % 2 == half)
          add_queries_sm90<T, D>(p, head, scores + step % 2 * ScoresSm90<D>::kBytes, memory.own[0], i0,
                                 D > 64 ? 64 * half : 0);
      }
      ptx::wgmma_wait<0>();
      memory.ring.release(2 * step);
      memory.ring.release(2 * step + 1);
    };
#pragma unroll 1
    for (int h = 0, step = 0; h < group; ++h) {
      const Head head(p, b, first_head + h);
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile, ++step) multiply(step, head, start + tile * Shape::kOthers);
    }
  }
  store_keys<T, kPlain>(p, own, row0, dkey, dvalue);
}

template <class T, int D, bool kPlain>
void launch_keys_sm90(Backward p, Stream stream) {
  using Shape = KeysShapeSm90<D>;
  share_out_keys<T>(p, Shape::kRows);
  if (p.schedule.empty()) return;
  auto run = [&](auto kernel, int bytes) {
    launch("attention_backward", kernel, p.schedule.grid(), dim3(Shape::kThreads), bytes, stream, p);
  };
  if constexpr (D <= 128) {
    if (p.dquery_sum != nullptr)
      run(differentiate_keys_sm90<T, D, kPlain, true, true, true>, Shape::kBytes + 2 * ScoresSm90<D>::kBytes);
    else if (p.dkey != nullptr || p.dvalue != nullptr)
      run(differentiate_keys_sm90<T, D, kPlain, true, true, false>, Shape::kBytes);
  } else {
    if (p.dkey != nullptr) run(differentiate_keys_sm90<T, D, kPlain, true, false, false>, Shape::kBytes);
    if (p.dvalue != nullptr) run(differentiate_keys_sm90<T, D, kPlain, false, true, false>, Shape::kBytes);
  }
}

}  // namespace torchweld::cuda
