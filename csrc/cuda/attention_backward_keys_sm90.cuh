// The gradients of keys and values on Hopper: attention_backward_keys.cuh with the products of wgmma, all of it
// transposed like there.
#pragma once

#include "cuda/attention_backward_keys.cuh"
#include "cuda/attention_backward_sm90.cuh"

namespace torchweld::cuda {

template <int D>
using KeysShapeSm90 = BackwardShapeSm90<D, 64>;

// kKey, kValue: which of the gradients.
template <class T, int D, bool kPlain, bool kKey, bool kValue>
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
  BackwardMemorySm90<Shape> memory;
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
        ptx::cp_async<4>(memory.values_of(item) + threadIdx.x * 4,
                         (item % 2 == 0 ? p.lse2 : p.delta) + head.values + i, i < head.queries ? 4 : 0);
    });
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const int row = (warpgroup() - 1) * 64, row0 = j0 + row + warp() % 4 * 16;
  float dkey[1][kKey ? D / 8 : 1][4] = {}, dvalue[1][kValue ? D / 8 : 1][4] = {};
  if (steps > 0) {
    memory.ring.await(0);
    const OwnRows<T, D, Shape> rows(memory, row);
    const float unit = unit_of<kPlain>(p);
    float s[1][NT][4], ds[1][NT][4];
    Lefts<NT> weights, gradients;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const Head head = kPlain ? own : Head(p, b, first_head + step / tiles);  // plain scores are alike for all heads
      const int i0 = start + step % tiles * Shape::kOthers;
      const Cells<true> cells{head, row0, i0};
      const bool edge = !head.sees_all(i0, Shape::kOthers, j0 + row, 64);
      const bool drops = !kPlain && p.dropout.seed != nullptr;
      const uint32_t queries = memory.item(2 * step), doutputs = memory.item(2 * step + 1);
      auto value_of = [&](int which, int n, int e) {
        return __uint_as_float(
            ptx::load_shared(memory.values_of(2 * step + which) + (n * 8 + lane_column() + e % 2) * 4));
      };
      auto lse2 = [&](int, int n, int e) { return value_of(0, n, e); };
      auto delta = [&](int, int n, int e) { return value_of(1, n, e); };
      auto begin_values = [&] {
        weights.template take<T>(s);
        ptx::wgmma_fence();
        if constexpr (kValue) begin_columns<T, D>(dvalue, weights, doutputs);
        ptx::wgmma_commit();
      };

      // Products.
      memory.ring.await(2 * step);
      rows.begin(s, 0, queries);
      memory.ring.await(2 * step + 1);
      if constexpr (kKey) rows.begin(ds, 1, doutputs);

      // Weights and their gradients; where all that is needed is known, the product of the former goes ahead.
      Kept<true, 1, NT> kept;
      if constexpr (kPlain) {
        ptx::wgmma_wait<kKey ? 1 : 0>();
        if (edge) hide(cells, s);
        weigh(s, unit, lse2);
        if constexpr (kValue) begin_values();
        if constexpr (kKey) {
          ptx::wgmma_wait<kValue ? 1 : 0>();
          subtract_delta(p, ds, drops, kept, delta);
          if (edge) hide_gradients(cells, ds);
        }
      } else {
        ptx::wgmma_wait<0>();
        if (drops) kept.draw(p.dropout, head.values, row0, i0);
        if constexpr (kKey) subtract_delta(p, ds, drops, kept, delta);
        modify(p, cells, s, kKey ? ds : nullptr);
        if (edge) hide(cells, s, kKey ? ds : nullptr);
        weigh(s, unit, lse2);
      }
      if constexpr (kKey) {
        for_each<1, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
        gradients.template take<T>(ds);
        ptx::wgmma_fence();
        begin_columns<T, D>(dkey, gradients, queries);
        ptx::wgmma_commit();
      }
      if constexpr (kValue && !kPlain) {
        if (drops) drop(s, kept);
        begin_values();
      }
      ptx::wgmma_wait<0>();
      memory.ring.release(2 * step);
      memory.ring.release(2 * step + 1);
    }
  }
  store_keys<T, kPlain>(p, own, row0, dkey, dvalue);
}

template <class T, int D, bool kPlain>
void launch_keys_sm90(Backward p, Stream stream) {
  using Shape = KeysShapeSm90<D>;
  share_out_keys<T>(p, Shape::kRows);
  if (p.schedule.empty()) return;
  auto run = [&](auto kernel) {
    launch("attention_backward", kernel, p.schedule.grid(), dim3(Shape::kThreads), Shape::kBytes, stream, p);
  };
  constexpr bool kTogether = D <= 128;
  if (p.dkey != nullptr || (kTogether && p.dvalue != nullptr))
    run(differentiate_keys_sm90<T, D, kPlain, true, kTogether>);
  if constexpr (!kTogether)
    if (p.dvalue != nullptr) run(differentiate_keys_sm90<T, D, kPlain, false, true>);
}

}  // namespace torchweld::cuda
