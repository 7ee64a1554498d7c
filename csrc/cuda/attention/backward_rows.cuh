// The kernels of the backward that work on rows: prepare_rows, round_dquery and reduce_heads (see backward.cuh).
#pragma once

#include "cuda/attention/backward.cuh"

namespace torchweld::cuda::attention {

constexpr int kPrepareWarps = 8, kReduceThreads = 256;

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

template <class T>
__global__ void __launch_bounds__(kPrepareWarps* kWarpSize) prepare_rows(const __grid_constant__ Backward p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPrepareWarps + warp();
  if (row >= query_rows(p)) return;
  const int64_t i = row % p.total_q, h = row / p.total_q % p.heads, b = row / p.total_q / p.heads;
  const T* output = static_cast<const T*>(p.output) + b * p.output_strides.batch + h * p.output_strides.head +
                    i * p.output_strides.row;
  const T* doutput = static_cast<const T*>(p.doutput) + b * p.doutput_strides.batch + h * p.doutput_strides.head +
                     i * p.doutput_strides.row;
  float sum = 0.0f;
  for (int64_t c = lane(); c < p.value_dim; c += kWarpSize) {
    Vector<T, 1> o, d;
    o.load_once(output + c);
    d.load(doutput + c);
    sum += o[0] * d[0];
  }
  sum = group_sum(sum, kWarpSize);
  if (p.dquery_accumulator != nullptr)
    for (int64_t c = lane(); c < p.accumulator_width(); c += kWarpSize)
      p.dquery_accumulator[row * p.accumulator_width() + c] = 0.0f;
  if (lane() != 0) return;
  const float dlse = p.dlse != nullptr ? p.dlse[row] : 0.0f, score_scale = score_scale_of(p, is_plain(p));
  const ForwardStatistics statistics(p, row, score_scale);
  p.softmax_statistics[row] = make_float2(finite_or_zero(statistics.max), statistics.log2_sum);
  p.gradient_statistics[row] = statistics.is_one ? make_float2(0.0f, -dlse) : make_float2(1.0f, sum - dlse);
  if (p.row_dsinks != nullptr) p.row_dsinks[row] = (dlse - sum) * sink_weight(statistics, score_scale, p.sinks[h]);
}

template <class T>
__global__ void __launch_bounds__(kPrepareWarps* kWarpSize) round_dquery(const __grid_constant__ Backward p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPrepareWarps + warp();
  if (row >= query_rows(p)) return;
  const int64_t i = row % p.total_q, h = row / p.total_q % p.heads, b = row / p.total_q / p.heads;
  T* to = static_cast<T*>(p.dquery) + b * p.dquery_strides.batch + h * p.dquery_strides.head + i * p.dquery_strides.row;
  for (int64_t c = lane(); c < p.dim; c += kWarpSize)
    store_one(to + c, p.dquery_accumulator[row * p.accumulator_width() + c] * p.scale);
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
