// The kernels of the backward that work on rows: prepare_rows, round_dquery and reduce_heads (see backward.cuh).
#pragma once

#include "cuda/attention/backward.cuh"

namespace torchweld::cuda::attention {

constexpr int kReduceThreads = 256;

// The rows of all heads and sequences.
__host__ __device__ inline int64_t query_rows(const AttentionInputs& p) {
  return (p.cu_seqlens_q != nullptr ? 1 : p.batch) * p.heads * p.total_q;
}

// The forward's statistics of a row, such that P = exp2((score - max) * scale_log2 - log2_sum).
struct ForwardStatistics {
  float max, log2_sum;
  bool is_one;  // the row has one probability, which is 1

  __device__ __forceinline__ ForwardStatistics(const Backward& p, int64_t row, float score_scale) {
    max = p.max[row];
    is_one = false;
    if (p.inverse != nullptr) {
      log2_sum = -log2f(p.inverse[row]);
      is_one = p.inverse[row] == 1.0f;
    } else {  // p.max holds lse
      const float lse = max;
      max = lse / score_scale;
      log2_sum = lse == -infinity() ? infinity() : -__fmaf_rn(max, score_scale, -lse) * kLog2e;
    }
  }
};

// The probability of a sink, exp(sink - lse).
__device__ __forceinline__ float sink_weight(const ForwardStatistics& row, float score_scale, float sink) {
  const double below = sink - static_cast<double>(row.max) * score_scale;
  return below > 80.0 ? 1.0f : static_cast<float>(exp(below - row.log2_sum * static_cast<double>(kLn2)));
}

// Which row of which head a thread of prepare_rows and round_dquery works on, and what share of it. A block has kRows
// rows of one head, a row kLanes lanes. A lane owns kChunk neighbours, 16 bytes, of every kLanes * kChunk.
template <class T, int D>
struct RowShare {
  static constexpr int kThreads = 256, kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kLanes = D / kChunk < kWarpSize ? D / kChunk : kWarpSize, kRows = kThreads / kLanes;
  int b, h, lane;
  int64_t i, row;  // in the head; in all heads

  static unsigned tiles(const AttentionInputs& p) { return static_cast<unsigned>((p.total_q + kRows - 1) / kRows); }
  static dim3 grid(const char* name, const AttentionInputs& p) {
    return grid_of(name, query_rows(p) / p.total_q * tiles(p));
  }

  // tiles_: tiles(p)
  __device__ __forceinline__ RowShare(const AttentionInputs& p, unsigned tiles_) {
    const unsigned head = blockIdx.x / tiles_, heads = static_cast<unsigned>(p.heads);
    b = static_cast<int>(head / heads), h = static_cast<int>(head % heads);
    lane = static_cast<int>(threadIdx.x % kLanes);
    i = static_cast<int64_t>(blockIdx.x - head * tiles_) * kRows + threadIdx.x / kLanes;
    row = head * p.total_q + i;
  }
  __device__ __forceinline__ bool exists(const AttentionInputs& p) const { return i < p.total_q; }
  __device__ __forceinline__ int64_t at(const Strides& s) const { return b * s.batch + h * s.head + i * s.row; }
  // Calls f(c) for the first column of each of this lane's chunks.
  template <class F>
  __device__ __forceinline__ void for_each(int64_t columns, F&& f) const {
    for (int c = lane * kChunk; c < columns; c += kLanes * kChunk) f(c);
  }
};

// A chunk of a row that has `left` more elements; zeros after them. The same numbers at any alignment, so that their
// sums have one order.
template <class T, int V>
__device__ __forceinline__ Vector<T, V> load_row_chunk(const T* from, int64_t left, bool vectorized) {
  Vector<T, V> chunk;
  if (vectorized) {
    chunk.load(from);
  } else {
    chunk.set([&](int k) {
      Vector<T, 1> one{};
      if (k < left) one.load(from + k);
      return one[0];
    });
  }
  return chunk;
}

template <class T, int D>
__global__ void __launch_bounds__(RowShare<T, D>::kThreads)
    prepare_rows(const __grid_constant__ Backward p, unsigned tiles) {
  using Share = RowShare<T, D>;
  constexpr int V = Share::kChunk;
  const Share own(p, tiles);
  const bool exists = own.exists(p);
  float sum = 0.0f;
  if (exists) {
    const T* output = static_cast<const T*>(p.output) + own.at(p.output_strides);
    const T* doutput = static_cast<const T*>(p.doutput) + own.at(p.doutput_strides);
    own.for_each(p.value_dim, [&](int c) {
      const auto o = load_row_chunk<T, V>(output + c, p.value_dim - c, p.vectorized);
      const auto d = load_row_chunk<T, V>(doutput + c, p.value_dim - c, p.vectorized);
#pragma unroll
      for (int k = 0; k < V; ++k) sum = __fmaf_rn(o[k], d[k], sum);
    });
  }
  sum = group_sum(sum, Share::kLanes);
  if (!exists) return;
  if (p.dquery_accumulator != nullptr) {
    const int width = static_cast<int>(p.accumulator_width());
    float* to = p.dquery_accumulator + own.row * width;
    for (int c = own.lane * 2; c < width; c += Share::kLanes * 2)
      *reinterpret_cast<float2*>(to + c) = make_float2(0.0f, 0.0f);
  }
  if (own.lane != 0) return;
  const int64_t row = own.row;
  const float dlse = p.dlse != nullptr ? p.dlse[row] : 0.0f, score_scale = score_scale_of(p, is_plain(p));
  const ForwardStatistics statistics(p, row, score_scale);
  p.softmax_statistics[row] = make_float2(finite_or_zero(statistics.max), statistics.log2_sum);
  p.gradient_statistics[row] = statistics.is_one ? make_float2(0.0f, -dlse) : make_float2(1.0f, sum - dlse);
  if (p.row_dsinks != nullptr) p.row_dsinks[row] = (dlse - sum) * sink_weight(statistics, score_scale, p.sinks[own.h]);
}

template <class T, int D>
__global__ void __launch_bounds__(RowShare<T, D>::kThreads)
    round_dquery(const __grid_constant__ Backward p, unsigned tiles) {
  constexpr int V = RowShare<T, D>::kChunk;
  const RowShare<T, D> own(p, tiles);
  if (!own.exists(p)) return;
  T* to = static_cast<T*>(p.dquery) + own.at(p.dquery_strides);
  const float* from = p.dquery_accumulator + own.row * p.accumulator_width();
  own.for_each(p.dim, [&](int c) {
    if (p.vectorized) {
      Vector<float, V> sums;
      Vector<T, V> rounded;
      sums.load_once(from + c);
      rounded.set([&](int k) { return sums[k] * p.scale; });
      rounded.store(to + c);
    } else {
      for (int k = 0; k < V && c + k < p.dim; ++k) store_one(to + c + k, from[c + k] * p.scale);
    }
  });
}

// Runs before the other kernels.
template <class T, int D>
void launch_prepare(const char* name, Backward p, Stream stream) {
  using Share = RowShare<T, D>;
  if (query_rows(p) == 0) return;
  p.vectorized = p.value_dim % Share::kChunk == 0 &&
                 rows_aligned(16, sizeof(T), {p.output, p.doutput}, {p.output_strides, p.doutput_strides});
  launch(name, prepare_rows<T, D>, Share::grid(name, p), dim3(Share::kThreads), 0, stream, p, Share::tiles(p));
}

// Runs after them, where they have added dquery up.
template <class T, int D>
void launch_round(const char* name, Backward p, Stream stream) {
  using Share = RowShare<T, D>;
  if (query_rows(p) == 0 || p.dquery_accumulator == nullptr) return;
  p.vectorized = p.dim % Share::kChunk == 0 && rows_aligned(16, sizeof(T), {p.dquery}, {p.dquery_strides}) &&
                 aligned16(p.dquery_accumulator);
  launch(name, round_dquery<T, D>, Share::grid(name, p), dim3(Share::kThreads), 0, stream, p, Share::tiles(p));
}

// Block -> head (b, h).
__global__ void __launch_bounds__(kReduceThreads) reduce_heads(const __grid_constant__ Backward p) {
  const Head head(p, static_cast<int>(blockIdx.x / p.heads), static_cast<int>(blockIdx.x % p.heads));
  auto reduce = [&](const float* rows, float* sum) {
    double total = 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < head.queries; i += kReduceThreads)
      total += rows[head.statistics_begin + i];
    total = block_sum(total, kReduceThreads);
    if (threadIdx.x == 0) sum[blockIdx.x] = static_cast<float>(total);
  };
  if (p.dsinks != nullptr) reduce(p.row_dsinks, p.dsinks);
  __syncthreads();  // the second sum reuses the shared memory of the first
  if (p.dalibi_slopes != nullptr) reduce(p.row_dslopes, p.dalibi_slopes);
}

}  // namespace torchweld::cuda::attention
