// What the backward needs of every query before its products, and the gradients that are sums over a head's queries:
// see backward.cuh.
#pragma once

#include "cuda/attention/backward.cuh"

namespace torchweld::cuda {

constexpr int kPrepareWarps = 8, kReduceThreads = 256;

// Of all heads, in all sequences.
__host__ __device__ inline int64_t query_rows(const AttentionInputs& p) {
  return (p.cu_seqlens_q != nullptr ? 1 : p.batch) * p.heads * p.total_q;
}

// The forward's max and sum of a row, the latter as what P = exp2((score - max) * unit - log2_sum) wants of it.
struct RowStatistics {
  float max, log2_sum;
  bool is_one;  // a weight of 1, and no others

  __device__ __forceinline__ RowStatistics(const Backward& p, int64_t row, float natural) {
    max = p.max[row];
    is_one = false;
    if (p.inverse != nullptr) {
      log2_sum = -log2f(p.inverse[row]);
      is_one = p.inverse[row] == 1.0f;
    } else {  // p.max is lse
      const float lse = max;
      max = lse / natural;
      log2_sum = lse == -infinity() ? infinity() : -__fmaf_rn(max, natural, -lse) * kLog2e;
    }
  }
};

// The weight of a sink, exp(sink - lse).
__device__ __forceinline__ float sink_weight(const RowStatistics& row, float natural, float sink) {
  const double below = sink - static_cast<double>(row.max) * natural;
  return below > 80.0 ? 1.0f : static_cast<float>(exp(below - row.log2_sum * static_cast<double>(kLn2)));
}

template <class T>
__global__ void __launch_bounds__(kPrepareWarps* kLanes) prepare(const __grid_constant__ Backward p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPrepareWarps + warp();
  if (row >= query_rows(p)) return;
  const int64_t i = row % p.total_q, h = row / p.total_q % p.heads, b = row / p.total_q / p.heads;
  const T* output = static_cast<const T*>(p.output) + b * p.output_strides.batch + h * p.output_strides.head +
                    i * p.output_strides.row;
  const T* doutput = static_cast<const T*>(p.doutput) + b * p.doutput_strides.batch + h * p.doutput_strides.head +
                     i * p.doutput_strides.row;
  float sum = 0.0f;
  for (int64_t c = lane(); c < p.value_dim; c += kLanes) {
    Run<T, 1> o, d;
    o.load_once(output + c);
    d.load(doutput + c);
    sum += o[0] * d[0];
  }
  sum = group_sum(sum, kLanes);
  if (p.dquery_sum != nullptr)
    for (int64_t c = lane(); c < p.sum_width(); c += kLanes) p.dquery_sum[row * p.sum_width() + c] = 0.0f;
  if (lane() != 0) return;
  const float dlse = p.dlse != nullptr ? p.dlse[row] : 0.0f, natural = natural_of(p, is_plain(p));
  const RowStatistics statistics(p, row, natural);
  p.softmax[row] = make_float2(finite(statistics.max), statistics.log2_sum);
  p.gradient[row] = statistics.is_one ? make_float2(0.0f, -dlse) : make_float2(1.0f, sum - dlse);
  if (p.sinks_of_rows != nullptr) p.sinks_of_rows[row] = (dlse - sum) * sink_weight(statistics, natural, p.sinks[h]);
}

template <class T>
__global__ void __launch_bounds__(kPrepareWarps* kLanes) round_queries(const __grid_constant__ Backward p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPrepareWarps + warp();
  if (row >= query_rows(p)) return;
  const int64_t i = row % p.total_q, h = row / p.total_q % p.heads, b = row / p.total_q / p.heads;
  T* to = static_cast<T*>(p.dquery) + b * p.dquery_strides.batch + h * p.dquery_strides.head + i * p.dquery_strides.row;
  for (int64_t c = lane(); c < p.dim; c += kLanes) store_one(to + c, p.dquery_sum[row * p.sum_width() + c] * p.scale);
}

// Block -> head (b, h).
__global__ void __launch_bounds__(kReduceThreads) reduce_heads(const __grid_constant__ Backward p) {
  const Head head(p, static_cast<int>(blockIdx.x / p.heads), static_cast<int>(blockIdx.x % p.heads));
  double* sums = reinterpret_cast<double*>(shared_memory);
  auto block_sum = [&](auto&& term) {
    double total = 0.0;
    for (int i = static_cast<int>(threadIdx.x); i < head.queries; i += kReduceThreads) total += term(head.values + i);
    sums[threadIdx.x] = total;
    for (int half = kReduceThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    __syncthreads();
    const auto all = static_cast<float>(sums[0]);
    __syncthreads();  // the next sum may begin
    return all;
  };
  if (p.dsinks != nullptr) {
    const float total = block_sum([&](int64_t row) { return static_cast<double>(p.sinks_of_rows[row]); });
    if (threadIdx.x == 0) p.dsinks[blockIdx.x] = total;
  }
  if (p.dalibi_slopes != nullptr) {
    const float total = block_sum([&](int64_t row) { return static_cast<double>(p.distances[row]); });
    if (threadIdx.x == 0) p.dalibi_slopes[blockIdx.x] = total;
  }
}

}  // namespace torchweld::cuda
