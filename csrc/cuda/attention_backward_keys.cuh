// The gradients of keys and values: see attention_backward.cuh.
//
// All is transposed: scores^T = key @ query^T has a row per key, so that P^T and dS^T are the left operands of both
// gradients where they are, in registers, and lse and delta are read by column. A key head's query heads are taken one
// after the other. From head size 129 on the two gradients do not fit the registers together: a block makes one of
// them.
#pragma once

#include "cuda/attention_backward.cuh"

namespace torchweld::cuda {

// kKey, kValue: which of the gradients.
template <class T, int D, bool kPlain, bool kKey, bool kValue>
__global__ void __launch_bounds__(BackwardShape<T, D, kPlain>::kThreads, 2)
    differentiate_keys(const __grid_constant__ Backward p) {
  using Shape = BackwardShape<T, D, kPlain>;
  constexpr int MT = Shape::MT, NT = Shape::kOthers / 8, kThreads = Shape::kThreads;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const int group = static_cast<int>(p.heads / p.kv_heads), b = static_cast<int>(work.head / p.kv_heads);
  const int first_head = static_cast<int>(work.head % p.kv_heads) * group;
  const Head own(p, b, first_head);
  const int j0 = work.tile * Shape::kRows, row0 = j0 + warp() * MT * 16;
  if (j0 >= own.keys) return;

  // Which queries see the block's keys: the same of every head.
  const int end = j0 + Shape::kRows < own.keys ? j0 + Shape::kRows : own.keys;
  const int start = own.first(j0) / Shape::kOthers * Shape::kOthers, last = own.last(end);
  const int tiles = start < last ? (last - start + Shape::kOthers - 1) / Shape::kOthers : 0;
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
    const int i0 = start + step % tiles * Shape::kOthers, i = i0 + static_cast<int>(threadIdx.x);
    load_tile<T, D, Shape::kOthers, kThreads>(memory.others(step, 0), rows.query, i0);
    load_tile<T, D, Shape::kOthers, kThreads>(memory.others(step, 1), rows.doutput, i0);
    if (static_cast<int>(threadIdx.x) < Shape::kOthers) {
      const int bytes = i < head.queries ? 4 : 0;
      const uint32_t place = threadIdx.x * 4;
      ptx::cp_async<4>(memory.values(step, 0) + place, p.lse2 + head.values + i, bytes);
      ptx::cp_async<4>(memory.values(step, 1) + place, p.delta + head.values + i, bytes);
    }
  };

  float dkey[MT][kKey ? D / 8 : 1][4] = {}, dvalue[MT][kValue ? D / 8 : 1][4] = {};
  const float unit = unit_of<kPlain>(p);
  memory.pipeline(tiles * group, load, [&](int step) {
    const Head head(p, b, first_head + step / tiles);
    const int i0 = start + step % tiles * Shape::kOthers;
    auto value_of = [&](int which, int n, int e) {
      return __uint_as_float(ptx::load_shared(memory.values(step, which) + (n * 8 + lane_column() + e % 2) * 4));
    };

    // Products.
    float s[MT][NT][4], ds[MT][NT][4];
    multiply_rows<T, D>(s, memory.own_rows(0), memory.others(step, 0));
    if constexpr (kKey) multiply_rows<T, D>(ds, memory.own_rows(1), memory.others(step, 1));
    const bool drops = !kPlain && p.dropout.seed != nullptr;
    Kept<true, MT, NT> kept;
    if (drops) kept.draw(p.dropout, head.values, row0, i0);
    if constexpr (kKey) subtract_delta(p, ds, drops, kept, [&](int, int n, int e) { return value_of(1, n, e); });

    // Weights.
    const Cells<true> cells{head, row0, i0};
    if constexpr (!kPlain) modify(p, cells, s, kKey ? ds : nullptr);
    if (!head.sees_all(i0, Shape::kOthers, j0, Shape::kRows)) hide(cells, s, kKey ? ds : nullptr);
    weigh(s, unit, [&](int, int n, int e) { return value_of(0, n, e); });

    // Gradients.
    if constexpr (kKey) {
      for_each<MT, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
      multiply_columns<T, D>(dkey, ds, memory.others(step, 0));
    }
    if constexpr (kValue) {
      if (drops) drop(s, kept);
      multiply_columns<T, D>(dvalue, s, memory.others(step, 1));
    }
  });

  // Store.
  auto store = [&](const auto& gradient, void* base, const Strides& strides, int64_t size, float factor) {
    T* to = own.key_rows(static_cast<T*>(base), strides);
    store_rows<T>(
        gradient, static_cast<int>(size), p.pairs,
        [&](int m, int half) {
          const int j = row0 + m * 16 + lane_row() + half * 8;
          return j < own.keys ? to + j * strides.row : nullptr;
        },
        [&](int, int) { return factor; });
  };
  if (kKey && p.dkey != nullptr) store(dkey, p.dkey, p.dkey_strides, p.dim, p.scale);
  if (kValue && p.dvalue != nullptr)
    store(dvalue, p.dvalue, p.dvalue_strides, p.value_dim,
          !kPlain && p.dropout.seed != nullptr ? p.dropout.scale : 1.0f);
}

template <class T, int D, bool kPlain>
void launch_keys(Backward p, Stream stream) {
  using Shape = BackwardShape<T, D, kPlain>;
  p.packets = reads_packets<T>(p);
  p.pairs = writes_pairs<T>(p);
  p.schedule = Schedule(p.batch * p.kv_heads, p.keys, Shape::kRows, 1,
                        p.queries * (p.dim + p.value_dim) * sizeof(T) * (p.heads / p.kv_heads), true);
  if (p.schedule.empty()) return;
  auto run = [&](auto kernel) {
    launch("attention_backward", kernel, p.schedule.grid(), dim3(Shape::kThreads), Shape::kBytes, stream, p);
  };
  if constexpr (D <= 128) {
    if (p.dkey != nullptr || p.dvalue != nullptr) run(differentiate_keys<T, D, kPlain, true, true>);
  } else {
    if (p.dkey != nullptr) run(differentiate_keys<T, D, kPlain, true, false>);
    if (p.dvalue != nullptr) run(differentiate_keys<T, D, kPlain, false, true>);
  }
}

}  // namespace torchweld::cuda
