// The gradient of queries: see attention/backward.cuh.
#pragma once

#include "cuda/attention/backward.cuh"

namespace torchweld::cuda {

// What a lane needs of its queries.
template <int MT>
struct RowValues {
  float2 softmax[MT][2], gradient[MT][2];

  __device__ __forceinline__ RowValues(const Backward& p, const Head& head, int row0) {
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
      const int i = row0 + r / 2 * 16 + lane_row() + r % 2 * 8;
      const bool exists = i < head.queries;
      softmax[r / 2][r % 2] = exists ? p.softmax[head.values + i] : make_float2(0.0f, infinity());
      gradient[r / 2][r % 2] = exists ? p.gradient[head.values + i] : make_float2(0.0f, 0.0f);
    }
  }
};

// ds = P * (dP - delta) of the block's queries from i0, those of this warp from row0, and a tile of keys from j0.
// capped: of the product itself, where a softcap comes after it.
template <class T, int D, bool kPlain, int NT, int MT>
__device__ __forceinline__ void score_gradient(const Backward& p, const Head& head, const RowValues<MT>& values,
                                               const BackwardMemory<T, D, kPlain>& memory, int step, int i0, int row0,
                                               int j0, bool capped, float (&ds)[MT][NT][4]) {
  float s[MT][NT][4];
  multiply_rows<T, D>(s, memory.own_rows(0), memory.others(step, 0));
  multiply_rows<T, D>(ds, memory.own_rows(1), memory.others(step, 1));
  const bool drops = !kPlain && p.dropout.seed != nullptr;
  Kept<false, MT, NT> kept;
  if (drops) kept.draw(p.dropout, head.values, row0, j0);
  subtract_delta(p, ds, drops, kept, [&](int m, int, int e) { return values.gradient[m][e / 2]; });
  const Cells<false> cells{head, row0, j0};
  using Shape = BackwardShape<T, D, kPlain>;
  const bool whole = head.sees_all(i0, Shape::kRows, j0, Shape::kOthers);
  if constexpr (!kPlain) modify(p, cells, whole, s, ds, capped);
  if (!whole) {
    hide(cells, s, -infinity());
    hide(cells, ds, 0.0f);
  }
  weigh(s, p.unit, [&](int m, int, int e) { return values.softmax[m][e / 2]; });
  for_each<MT, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
}

// The share of a tile in each row's gradient of the slope.
template <int MT, int NT>
__device__ __forceinline__ void add_distances(const Cells<false>& cells, const float (&ds)[MT][NT][4],
                                              float (&distances)[MT][2]) {
  for_each<MT, NT>([&](int m, int n, int e) {
    const int distance = cells.query(m, n, e) + cells.of.shift - cells.key(m, n, e);
    distances[m][e / 2] -= ds[m][n][e] * fabsf(static_cast<float>(distance));
  });
}

// Those of this warp's queries, from row0 on.
template <class T, int MT, int NT>
__device__ __forceinline__ void store_queries(const Backward& p, const Head& head, int row0,
                                              const float (&dquery)[MT][NT][4]) {
  T* to = head.query_rows(static_cast<T*>(p.dquery), p.dquery_strides);
  store_rows<T>(
      dquery, static_cast<int>(p.dim), p.pairs,
      [&](int m, int half) {
        const int i = row0 + m * 16 + lane_row() + half * 8;
        return i < head.queries ? to + i * p.dquery_strides.row : nullptr;
      },
      [&](int, int) { return p.scale; });
}

template <int MT>
__device__ __forceinline__ void store_distances(const Backward& p, const Head& head, int row0,
                                                const float (&distances)[MT][2]) {
#pragma unroll
  for (int r = 0; r < 2 * MT; ++r) {
    const int i = row0 + r / 2 * 16 + lane_row() + r % 2 * 8;
    const float sum = group_sum(distances[r / 2][r % 2], 4);
    if (lane_column() == 0 && i < head.queries) p.distances[head.values + i] = sum;
  }
}

// dquery and distances, whichever are wanted. With a softcap they are of different scores, and are asked for one by
// one.
template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(BackwardShape<T, D, kPlain>::kThreads, !kPlain && sizeof(T) == 2 && D <= 64 ? 3 : 2)
    differentiate_queries(const __grid_constant__ Backward p) {
  if (kOnHopper<T, D>) return;
  using Shape = BackwardShape<T, D, kPlain>;
  constexpr int MT = Shape::MT, NT = Shape::kOthers / 8, kThreads = Shape::kThreads;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kRows, row0 = i0 + warp() * MT * 16;
  if (i0 >= head.queries) return;

  const SeenKeys<Shape::kOthers> seen(head, i0, Shape::kRows);
  const BackwardRows<T> rows(p, head, seen.begin, seen.end);
  const BackwardMemory<T, D, kPlain> memory;
  if (seen.steps > 0) {
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[0], rows.query, i0);
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[1], rows.doutput, i0);
  }
  auto load = [&](int step) {
    if (step >= seen.steps) return;
    load_tile<T, D, Shape::kOthers, kThreads>(memory.others(step, 0), rows.key, seen.start + step * Shape::kOthers);
    load_tile<T, D, Shape::kOthers, kThreads>(memory.others(step, 1), rows.value, seen.start + step * Shape::kOthers);
  };

  float dquery[MT][D / 8][4] = {}, distances[MT][2] = {};
  const RowValues<MT> values(p, head, row0);
  memory.pipeline(seen.steps, load, [&](int step) {
    const int j0 = seen.start + step * Shape::kOthers;
    float ds[MT][NT][4];
    score_gradient<T, D, kPlain>(p, head, values, memory, step, i0, row0, j0, p.dquery != nullptr, ds);
    if (p.dquery != nullptr) multiply_columns<T, D>(dquery, ds, memory.others(step, 0), static_cast<int>(p.dim));
    if (!kPlain && p.distances != nullptr) add_distances(Cells<false>{head, row0, j0}, ds, distances);
  });

  if (p.dquery != nullptr) store_queries<T>(p, head, row0, dquery);
  if (!kPlain && p.distances != nullptr) store_distances(p, head, row0, distances);
}

template <class T>
void launch_queries(Backward p, int rows, void (*kernel)(Backward), int threads, size_t shared, Stream stream) {
  if (p.dquery == nullptr && p.distances == nullptr) return;
  if (p.dquery != nullptr && p.distances != nullptr && p.softcap != 0) {
    Backward without = p;
    without.distances = nullptr;
    launch_queries<T>(without, rows, kernel, threads, shared, stream);
    p.dquery = nullptr;
  }
  p.packets = reads_packets<T>(p);
  p.pairs = writes_pairs<T>(p);
  p.schedule = Schedule(p.batch * p.heads, p.queries, rows, p.heads / p.kv_heads,
                        p.keys * (p.dim + p.value_dim) * sizeof(T), false);
  if (p.schedule.empty()) return;
  launch("attention_backward", kernel, p.schedule.grid(), dim3(threads), shared, stream, p);
}

template <class T, int D, bool kPlain>
void launch_queries(const Backward& p, Stream stream) {
  using Shape = BackwardShape<T, D, kPlain>;
  launch_queries<T>(p, Shape::kRows, differentiate_queries<T, D, kPlain>, Shape::kThreads, Shape::kBytes, stream);
}

}  // namespace torchweld::cuda
