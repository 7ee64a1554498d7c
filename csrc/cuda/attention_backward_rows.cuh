// What the backward needs of every query before its products, and the gradients that are sums over a head's queries:
// see attention_backward.cuh.
#pragma once

#include "cuda/attention_backward.cuh"

namespace torchweld::cuda {

constexpr int kPrepareWarps = 8, kReduceThreads = 256;

// Of all heads, in all sequences.
__host__ __device__ inline int64_t query_rows(const AttentionInputs& p) {
  return (p.cu_seqlens_q != nullptr ? 1 : p.batch) * p.heads * p.total_q;
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
  p.delta[row] = sum - (p.dlse != nullptr ? p.dlse[row] : 0.0f);
  p.lse2[row] = p.max[row] == -infinity() ? infinity() : p.max[row] * kLog2e;
}

template <class T>
__global__ void __launch_bounds__(kPrepareWarps* kLanes) round_queries(const __grid_constant__ Backward p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kPrepareWarps + warp();
  if (row >= query_rows(p)) return;
  const int64_t i = row % p.total_q, h = row / p.total_q % p.heads, b = row / p.total_q / p.heads;
  T* to = static_cast<T*>(p.dquery) + b * p.dquery_strides.batch + h * p.dquery_strides.head + i * p.dquery_strides.row;
  for (int64_t c = lane(); c < p.dim; c += kLanes) store_one(to + c, p.dquery_sum[row * p.sum_width() + c] * p.scale);
}

// Block -> head (b, h). A sink's own weight is exp(sink - lse), its value zero.
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
    const float total = block_sum([&](int64_t row) {
      const float lse = p.max[row];
      return lse == -infinity() ? 0.0 : -static_cast<double>(expf(p.sinks[head.h] - lse)) * p.delta[row];
    });
    if (threadIdx.x == 0) p.dsinks[blockIdx.x] = total;
  }
  if (p.dalibi_slopes != nullptr) {
    const float total = block_sum([&](int64_t row) { return static_cast<double>(p.distances[row]); });
    if (threadIdx.x == 0) p.dalibi_slopes[blockIdx.x] = total;
  }
}

}  // namespace torchweld::cuda
