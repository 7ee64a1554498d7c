// The gradients of queries and of a bias: see attention_backward.cuh.
#pragma once

#include "cuda/attention_backward.cuh"

namespace torchweld::cuda {

// What a lane needs of its queries.
template <int MT>
struct RowValues {
  float lse2[MT][2], delta[MT][2];

  __device__ __forceinline__ RowValues(const Backward& p, const Head& head, int row0) {
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
      const int i = row0 + r / 2 * 16 + lane_row() + r % 2 * 8;
      lse2[r / 2][r % 2] = i < head.queries ? p.lse2[head.values + i] : infinity();
      delta[r / 2][r % 2] = i < head.queries ? p.delta[head.values + i] : 0.0f;
    }
  }
};

// ds = P * (dP - delta) of the block's queries from i0, those of this warp from row0, and a tile of keys from j0.
// capped: of the product itself, where a softcap comes after it.
template <class T, int D, bool kPlain, int NT, int MT>
__device__ __forceinline__ void score_gradient(const Backward& p, const Head& head, const RowValues<MT>& values,
                                               const BackwardMemory<T, D, kPlain>& memory, int step, int i0, int row0,
                                               int j0, float unit, bool capped, float (&ds)[MT][NT][4]) {
  float s[MT][NT][4];
  multiply_rows<T, D>(s, memory.own_rows(0), memory.others(step, 0));
  multiply_rows<T, D>(ds, memory.own_rows(1), memory.others(step, 1));
  const bool drops = !kPlain && p.dropout.seed != nullptr;
  Kept<false, MT, NT> kept;
  if (drops) kept.draw(p.dropout, head.values, row0, j0);
  subtract_delta(p, ds, drops, kept, [&](int m, int, int e) { return values.delta[m][e / 2]; });
  const Cells<false> cells{head, row0, j0};
  if constexpr (!kPlain) modify(p, cells, s, ds, capped);
  using Shape = BackwardShape<T, D, kPlain>;
  if (!head.sees_all(i0, Shape::kRows, j0, Shape::kOthers)) hide(cells, s, ds);
  weigh(s, unit, [&](int m, int, int e) { return values.lse2[m][e / 2]; });
  for_each<MT, NT>([&](int m, int n, int e) { ds[m][n][e] *= s[m][n][e]; });
}

// dquery and distances, whichever are wanted. With a softcap they are of different scores, and are asked for one by
// one.
template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(BackwardShape<T, D, kPlain>::kThreads, 2)
    differentiate_queries(const __grid_constant__ Backward p) {
  using Shape = BackwardShape<T, D, kPlain>;
  constexpr int MT = Shape::MT, NT = Shape::kOthers / 8, kThreads = Shape::kThreads;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kRows, row0 = i0 + warp() * MT * 16;
  if (i0 >= head.queries) return;

  // What the block sees.
  const int last = (i0 + Shape::kRows < head.queries ? i0 + Shape::kRows : head.queries) - 1;
  const int begin = head.low(i0), end = head.high(last), start = begin / Shape::kOthers * Shape::kOthers;
  const int steps = begin < end ? (end - start + Shape::kOthers - 1) / Shape::kOthers : 0;
  const BackwardRows<T> rows(p, head, begin, end);
  const BackwardMemory<T, D, kPlain> memory;
  if (steps > 0) {
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[0], rows.query, i0);
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[1], rows.doutput, i0);
  }
  auto load = [&](int step) {
    if (step >= steps) return;
    load_tile<T, D, Shape::kOthers, kThreads>(memory.others(step, 0), rows.key, start + step * Shape::kOthers);
    load_tile<T, D, Shape::kOthers, kThreads>(memory.others(step, 1), rows.value, start + step * Shape::kOthers);
  };

  float dquery[MT][D / 8][4] = {}, distances[MT][2] = {};
  const RowValues<MT> values(p, head, row0);
  const float unit = unit_of<kPlain>(p);
  memory.pipeline(steps, load, [&](int step) {
    const int j0 = start + step * Shape::kOthers;
    float ds[MT][NT][4];
    score_gradient<T, D, kPlain>(p, head, values, memory, step, i0, row0, j0, unit, p.dquery != nullptr, ds);
    if (p.dquery != nullptr) multiply_columns<T, D>(dquery, ds, memory.others(step, 0), static_cast<int>(p.dim));
    if (!kPlain && p.distances != nullptr)
      for_each<MT, NT>([&](int m, int n, int e) {
        const Cells<false> cells{head, row0, j0};
        const int distance = cells.query(m, n, e) + head.shift - cells.key(m, n, e);
        distances[m][e / 2] -= ds[m][n][e] * fabsf(static_cast<float>(distance));
      });
  });

  // Store.
  auto row_of = [&](int m, int half) { return row0 + m * 16 + lane_row() + half * 8; };
  T* to = head.query_rows(static_cast<T*>(p.dquery), p.dquery_strides);
  if (p.dquery != nullptr)
    store_rows<T>(
        dquery, static_cast<int>(p.dim), p.pairs,
        [&](int m, int half) {
          return row_of(m, half) < head.queries ? to + row_of(m, half) * p.dquery_strides.row : nullptr;
        },
        [&](int, int) { return p.scale; });
  if (!kPlain && p.distances != nullptr) {
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
      const float sum = group_sum(distances[r / 2][r % 2], 4);
      if (lane_column() == 0 && row_of(r / 2, r % 2) < head.queries)
        p.distances[head.values + row_of(r / 2, r % 2)] = sum;
    }
  }
}

// Grid (tiles of keys, B * H * tiles of queries) of dbias's extents. Where bias is broadcast a block goes through all
// of that dimension, in order.
template <class T, int D>
__global__ void __launch_bounds__(BackwardShape<T, D, false>::kThreads, 2)
    differentiate_bias(const __grid_constant__ Backward p) {
  using Shape = BackwardShape<T, D, false>;
  constexpr int MT = Shape::MT, NT = Shape::kOthers / 8, kThreads = Shape::kThreads;
  const int64_t* extent = p.dbias_extents;
  const int queries = static_cast<int>(p.queries), keys = static_cast<int>(p.keys);
  const int row_tiles = extent[2] > 1 ? (queries + Shape::kRows - 1) / Shape::kRows : 1;
  const int key_tiles = extent[3] > 1 ? (keys + Shape::kOthers - 1) / Shape::kOthers : 1;
  const int kt = static_cast<int>(blockIdx.x % key_tiles), qt = static_cast<int>(blockIdx.x / key_tiles % row_tiles);
  const int64_t outer = blockIdx.x / key_tiles / row_tiles;
  const int b = static_cast<int>(outer / extent[1]), h = static_cast<int>(outer % extent[1]);
  const int i_begin = qt * Shape::kRows, i_end = extent[2] > 1 ? i_begin + 1 : queries;
  const int j_begin = kt * Shape::kOthers, j_end = extent[3] > 1 ? j_begin + 1 : keys;

  float sum[MT][NT][4] = {};
  const BackwardMemory<T, D, false> memory;
  const float unit = unit_of<false>(p);
  for (int bb = b; bb < (extent[0] > 1 ? b + 1 : static_cast<int>(p.batch)); ++bb)
    for (int hh = h; hh < (extent[1] > 1 ? h + 1 : static_cast<int>(p.heads)); ++hh) {
      const Head head(p, bb, hh);
      for (int i0 = i_begin; i0 < i_end; i0 += Shape::kRows) {
        const int last = (i0 + Shape::kRows < queries ? i0 + Shape::kRows : queries) - 1;
        const BackwardRows<T> rows(p, head, head.low(i0), head.high(last));
        const int row0 = i0 + warp() * MT * 16;
        const RowValues<MT> values(p, head, row0);
        for (int j0 = j_begin; j0 < j_end; j0 += Shape::kOthers) {
          if (j0 >= head.high(last) || j0 + Shape::kOthers <= head.low(i0)) continue;
          __syncthreads();
          load_tile<T, D, Shape::kRows, kThreads>(memory.own[0], rows.query, i0);
          load_tile<T, D, Shape::kRows, kThreads>(memory.own[1], rows.doutput, i0);
          load_tile<T, D, Shape::kOthers, kThreads>(memory.others(0, 0), rows.key, j0);
          load_tile<T, D, Shape::kOthers, kThreads>(memory.others(0, 1), rows.value, j0);
          ptx::cp_async_commit();
          ptx::cp_async_wait<0>();
          __syncthreads();
          float ds[MT][NT][4];
          score_gradient<T, D, false>(p, head, values, memory, 0, i0, row0, j0, unit, false, ds);
          for_each<MT, NT>([&](int m, int n, int e) { sum[m][n][e] += ds[m][n][e]; });
        }
      }
    }

  // The tile of sums goes to shared memory, and from there to dbias: over its rows or columns where bias is broadcast.
  __syncthreads();
  constexpr int kStride = Shape::kOthers + 1;
  for_each<MT, NT>([&](int m, int n, int e) {
    const int row = warp() * MT * 16 + 16 * m + lane_row() + e / 2 * 8, column = 8 * n + lane_column() + e % 2;
    ptx::store_shared(memory.own[0] + (row * kStride + column) * 4, __float_as_uint(sum[m][n][e]));
  });
  __syncthreads();
  auto least = [](int a, int b) { return a < b ? a : b; };
  const int rows_here = extent[2] > 1 ? least(Shape::kRows, queries - i_begin) : 1,
            rows_summed = extent[2] > 1 ? 1 : Shape::kRows;
  const int keys_here = extent[3] > 1 ? least(Shape::kOthers, keys - j_begin) : 1,
            keys_summed = extent[3] > 1 ? 1 : Shape::kOthers;
  for (int c = static_cast<int>(threadIdx.x); c < rows_here * keys_here; c += kThreads) {
    const int row = c / keys_here, column = c % keys_here;
    float total = 0.0f;
    for (int r = row; r < row + rows_summed; ++r)
      for (int k = column; k < column + keys_summed; ++k)
        total += __uint_as_float(ptx::load_shared(memory.own[0] + (r * kStride + k) * 4));
    const int64_t place = (outer * extent[2] + i_begin + row) * extent[3] + j_begin + column;
    auto store = [&](auto tag) {
      using B = typename decltype(tag)::type;
      store_one(static_cast<B*>(p.dbias) + place, total);
    };
    if (p.bias_type == MaskType::float32)
      store(Tag<float>{});
    else if (p.bias_type == MaskType::bfloat16)
      store(Tag<__nv_bfloat16>{});
    else
      store(Tag<__half>{});
  }
}

template <class T, int D, bool kPlain>
void launch_queries(Backward p, Stream stream) {
  using Shape = BackwardShape<T, D, kPlain>;
  if (p.dquery == nullptr && p.distances == nullptr) return;
  if (p.dquery != nullptr && p.distances != nullptr && p.softcap != 0) {
    Backward without = p;
    without.distances = nullptr;
    launch_queries<T, D, kPlain>(without, stream);
    p.dquery = nullptr;
  }
  p.packets = reads_packets<T>(p);
  p.pairs = writes_pairs<T>(p);
  p.schedule = Schedule(p.batch * p.heads, p.queries, Shape::kRows, p.heads / p.kv_heads,
                        p.keys * (p.dim + p.value_dim) * sizeof(T), false);
  if (p.schedule.empty()) return;
  launch("attention_backward", differentiate_queries<T, D, kPlain>, p.schedule.grid(), dim3(Shape::kThreads),
         Shape::kBytes, stream, p);
}

template <class T, int D>
void launch_bias(Backward p, Stream stream) {
  using Shape = BackwardShape<T, D, false>;
  p.packets = reads_packets<T>(p);
  const int64_t* extent = p.dbias_extents;
  const int64_t row_tiles = extent[2] > 1 ? (p.queries + Shape::kRows - 1) / Shape::kRows : 1;
  const int64_t key_tiles = extent[3] > 1 ? (p.keys + Shape::kOthers - 1) / Shape::kOthers : 1;
  const dim3 grid(static_cast<unsigned>(extent[0] * extent[1] * row_tiles * key_tiles));
  if (grid.x == 0) return;
  launch("attention_backward", differentiate_bias<T, D>, grid, dim3(Shape::kThreads), Shape::kBytes, stream, p);
}

}  // namespace torchweld::cuda
