// The gradients of keys and values: see attention/backward.cuh.
//
// All is transposed: scores^T = key @ query^T has a row per key, so that P^T and dS^T are the left operands of both
// gradients where they are, in registers, and row values are read by column. A key head's query heads are taken one
// after the other. From head size 129 on the two gradients do not fit the registers together: a block makes one of
// them.
#pragma once

#include "cuda/attention/backward.cuh"

namespace torchweld::cuda {

// dquery_sum += dS @ key: rows of the streamed queries from i0. All warps' dS^T is in shared memory, where each takes
// 16 queries and a part of the columns.
template <class T, int D, bool kPlain>
__device__ __forceinline__ void add_queries(const Backward& p, const Head& head,
                                            const BackwardMemory<T, D, kPlain>& memory, int i0) {
  using Shape = BackwardShape<T, D, kPlain>;
  constexpr int kTiles = Shape::kOthers / 16, kColumns = D * kTiles / Shape::kWarps,
                NT = kColumns > 32 ? 4 : kColumns / 8;
  const int row = warp() % kTiles * 16;
#pragma unroll 1
  for (int column = warp() / kTiles * kColumns, last = column + kColumns; column < last; column += 8 * NT) {
    float sum[1][NT][4] = {};
    multiply_transposed<T, Shape::kOthers, D, Shape::kRows>(sum, memory.scores(), row / 8, memory.own[0], column / 8);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + row + lane_row() + 8 * half;
      if (i >= head.queries) continue;
      float* to = p.dquery_sum + (head.values + i) * p.sum_width();
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int c = column + 8 * n + lane_column();
        if (c < p.dim) ptx::add_pair(to + c, sum[0][n][2 * half], sum[0][n][2 * half + 1]);
      }
    }
  }
}

// What is wanted of the gradients of this warp's keys, from row0 on.
template <class T, bool kPlain, int MT, int K, int V>
__device__ __forceinline__ void store_keys(const Backward& p, const Head& own, int row0, const float (&dkey)[MT][K][4],
                                           const float (&dvalue)[MT][V][4]) {
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
  if (K > 1 && p.dkey != nullptr) store(dkey, p.dkey, p.dkey_strides, p.dim, p.scale);
  if (V > 1 && p.dvalue != nullptr)
    store(dvalue, p.dvalue, p.dvalue_strides, p.value_dim,
          !kPlain && p.dropout.seed != nullptr ? p.dropout.scale : 1.0f);
}

// kKey, kValue, kQuery: which of the gradients. dkey and dquery come of the same dS.
template <class T, int D, bool kPlain, bool kKey, bool kValue, bool kQuery>
__global__ void __launch_bounds__(BackwardShape<T, D, kPlain>::kThreads, 2)
    differentiate_keys(const __grid_constant__ Backward p) {
  if (kOnHopper<T, D>) return;
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
      const int bytes = i < head.queries ? 8 : 0;
      const uint32_t place = threadIdx.x * 8;
      ptx::cp_async<8>(memory.values(step, 0) + place, p.softmax + head.values + i, bytes);
      ptx::cp_async<8>(memory.values(step, 1) + place, p.gradient + head.values + i, bytes);
    }
  };

  float dkey[MT][kKey ? D / 8 : 1][4] = {}, dvalue[MT][kValue ? D / 8 : 1][4] = {};
  memory.pipeline(tiles * group, load, [&](int step) {
    const Head head(p, b, first_head + step / tiles);
    const int i0 = start + step % tiles * Shape::kOthers;
    const uint32_t softmax = memory.values(step, 0) + lane_anew() % 4 * 16;
    const uint32_t gradient = softmax + memory.values(0, 1) - memory.values(0, 0);

    // Products.
    float s[MT][NT][4], ds[MT][NT][4];
    const int here = ptx::opaque(warp()) * MT * 16;  // this warp's rows; like lane_anew()
    const uint32_t rows = ptx::opaque(memory.own[0] + here * Shape::kRowBytes);
    multiply_rows<T, D, true>(s, rows, memory.others(step, 0));
    if constexpr (kKey) multiply_rows<T, D, true>(ds, rows + memory.own[1] - memory.own[0], memory.others(step, 1));
    const bool drops = !kPlain && p.dropout.seed != nullptr;
    Kept<true, MT, NT> kept;
    if (drops) kept.draw(p.dropout, head.values, row0, i0);
    if constexpr (kKey)
      subtract_delta(p, ds, drops, kept, [&](int, int n, int e) { return column_values(gradient, n, e); });

    // Weights.
    const Cells<true> cells{head, row0, i0};
    const bool whole = head.sees_all(i0, Shape::kOthers, j0, Shape::kRows);
    if constexpr (!kPlain) modify(p, cells, whole, s, kKey ? ds : nullptr);
    if (!whole) {
      hide(cells, s, -infinity());
      if constexpr (kKey) hide(cells, ds, 0.0f);
    }
    weigh(s, p.unit, [&](int, int n, int e) { return column_values(softmax, n, e); });

    // Gradients.
    if constexpr (kKey) {
      for_each<MT, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
      if constexpr (kQuery) store_tile<T>(memory.scores() + here * Shape::kOthers * static_cast<int>(sizeof(T)), ds);
      multiply_columns<T, D>(dkey, ds, memory.others(step, 0), static_cast<int>(p.dim));
    }
    if constexpr (kValue) {
      if (drops) drop(s, kept);
      multiply_columns<T, D>(dvalue, s, memory.others(step, 1), static_cast<int>(p.value_dim));
    }
    if constexpr (kQuery) {
      __syncthreads();  // all of dS is there; before it is written again comes the next step's barrier
      add_queries(p, head, memory, i0);
    }
  });

  store_keys<T, kPlain>(p, own, row0, dkey, dvalue);
}

// For blocks of so many rows.
template <class T>
void share_out_keys(Backward& p, int rows) {
  p.packets = reads_packets<T>(p);
  p.pairs = writes_pairs<T>(p);
  p.schedule = Schedule(p.batch * p.kv_heads, p.keys, rows, 1,
                        p.queries * (p.dim + p.value_dim) * sizeof(T) * (p.heads / p.kv_heads), true);
}

template <class T, int D, bool kPlain>
void launch_keys(Backward p, Stream stream) {
  using Shape = BackwardShape<T, D, kPlain>;
  share_out_keys<T>(p, Shape::kRows);
  if (p.schedule.empty()) return;
  auto run = [&](auto kernel, int bytes) {
    launch("attention_backward", kernel, p.schedule.grid(), dim3(Shape::kThreads), bytes, stream, p);
  };
  constexpr bool kTogether = D <= 128;
  if (p.dkey != nullptr || (kTogether && p.dvalue != nullptr) || p.dquery_sum != nullptr) {
    if constexpr (sizeof(T) == 2)
      if (p.dquery_sum != nullptr)
        run(differentiate_keys<T, D, kPlain, true, kTogether, true>, Shape::kBytes + Shape::kScoreBytes);
    if (p.dquery_sum == nullptr) run(differentiate_keys<T, D, kPlain, true, kTogether, false>, Shape::kBytes);
  }
  if constexpr (!kTogether)
    if (p.dvalue != nullptr) run(differentiate_keys<T, D, kPlain, false, true, false>, Shape::kBytes);
}

}  // namespace torchweld::cuda
