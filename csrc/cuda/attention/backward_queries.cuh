// What the kernels backward_queries of both families share: row statistics, dquery, slope gradients, the launch.
#pragma once

#include "cuda/attention/backward.cuh"

namespace torchweld::cuda::attention {

// The row statistics of a lane's queries, in registers. Missing queries get a probability of 0.
template <int MT>
struct RowStatistics {
  float2 softmax[MT][2], gradient[MT][2];

  __device__ __forceinline__ RowStatistics(const Backward& p, const Head& head, int row0) {
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
      const int i = row0 + r / 2 * 16 + lane_row() + r % 2 * 8;
      const bool exists = i < head.queries;
      softmax[r / 2][r % 2] = exists ? p.softmax_statistics[head.statistics_begin + i] : make_float2(0.0f, infinity());
      gradient[r / 2][r % 2] = exists ? p.gradient_statistics[head.statistics_begin + i] : make_float2(0.0f, 0.0f);
    }
  }
};

// Adds a tile's share of each row's slope gradient.
template <int MT, int NT>
__device__ __forceinline__ void add_dslopes(const ScorePositions<false>& positions, const float (&ds)[MT][NT][4],
                                            float (&dslopes)[MT][2]) {
  for_each<MT, NT>([&](int m, int n, int e) {
    const int distance = positions.query(m, n, e) + positions.of.shift - positions.key(m, n, e);
    dslopes[m][e / 2] -= ds[m][n][e] * fabsf(static_cast<float>(distance));
  });
}

// Stores dquery of this warp's queries, from row0 on.
template <class T, int MT, int NT>
__device__ __forceinline__ void store_dquery(const Backward& p, const Head& head, int row0,
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
__device__ __forceinline__ void store_dslopes(const Backward& p, const Head& head, int row0,
                                              const float (&dslopes)[MT][2]) {
#pragma unroll
  for (int r = 0; r < 2 * MT; ++r) {
    const int i = row0 + r / 2 * 16 + lane_row() + r % 2 * 8;
    const float sum = group_sum(dslopes[r / 2][r % 2], 4);
    if (lane_column() == 0 && i < head.queries) p.row_dslopes[head.statistics_begin + i] = sum;
  }
}

template <class T>
void launch_queries(Backward p, int rows, void (*kernel)(Backward), int threads, size_t shared, Stream stream) {
  if (p.dquery == nullptr && p.row_dslopes == nullptr) return;
  if (p.dquery != nullptr && p.row_dslopes != nullptr && p.softcap != 0) {
    Backward without = p;
    without.row_dslopes = nullptr;
    launch_queries<T>(without, rows, kernel, threads, shared, stream);
    p.dquery = nullptr;
  }
  p.vectorized = reads_vectorized<T>(p);
  p.pairs = writes_pairs<T>(p);
  p.schedule = Schedule(p.batch * p.heads, p.queries, rows, p.heads / p.kv_heads,
                        p.keys * (p.dim + p.value_dim) * sizeof(T), false);
  if (p.schedule.empty()) return;
  launch("attention_backward", kernel, p.schedule.grid(), dim3(threads), shared, stream, p);
}

}  // namespace torchweld::cuda::attention
