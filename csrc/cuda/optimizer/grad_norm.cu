// The norm of a list of gradients.
//
// square_sums  block b of kGradNormBlocks -> chunks b, b + kGradNormBlocks, ...: one partial sum each
// finish_norm  one block adds the partial sums in a fixed order
//
// Gradients are read once; grad_scale is read on the device.

#include "cuda/kernels.h"
#include "cuda/optimizer/optimizer.cuh"

namespace torchweld::cuda::optimizer {
namespace {

struct NormParams {
  const OptimizerTensor* table;
  int64_t count, chunks;
  const float* grad_scale;
  double* partial;  // [kGradNormBlocks]
  float* norm;      // []
};

template <class GT, int V>
__device__ __forceinline__ float squares_of(void* grad, int64_t begin, int64_t end) {
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V) {
    Vector<GT, V> g;
    g.load(at<GT>(grad, i));  // stays in the caches: step() reads it next
#pragma unroll
    for (int k = 0; k < V; ++k) sum += g[k] * g[k];
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) square_sums(const __grid_constant__ NormParams p) {
  double squares = 0.0;
  for (int64_t chunk = blockIdx.x; chunk < p.chunks; chunk += kGradNormBlocks) {
    const OptimizerTensor t = p.table[index_at(p.table, p.count, chunk * kOptimizerChunkCuda)];
    const int64_t begin = chunk * kOptimizerChunkCuda - t.begin, left = t.numel - begin;
    const int64_t end = begin + (left < kOptimizerChunkCuda ? left : kOptimizerChunkCuda);
    with_type(t.grad_dtype, [&](auto tag) {
      using GT = typename decltype(tag)::type;
      constexpr int V = 16 / sizeof(GT);
      const bool vectorized = reinterpret_cast<uintptr_t>(t.grad) % 16 == 0;
      const int64_t vector_end = vectorized ? begin + (end - begin) / V * V : begin;
      squares += squares_of<GT, V>(t.grad, begin, vector_end);
      squares += squares_of<GT, 1>(t.grad, vector_end, end);
    });
  }
  squares = block_sum(squares, blockDim.x);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = squares;
}

__global__ void __launch_bounds__(kGradNormBlocks) finish_norm(const __grid_constant__ NormParams p) {
  const double total = block_sum(p.partial[threadIdx.x], blockDim.x);
  if (threadIdx.x == 0)
    *p.norm = static_cast<float>(sqrt(total)) / (p.grad_scale != nullptr ? fabsf(*p.grad_scale) : 1.0f);
}

}  // namespace
}  // namespace torchweld::cuda::optimizer

namespace torchweld::cuda {

void grad_norm(const GradNormParams& p, Stream stream) {
  using namespace optimizer;
  fill_table("grad_norm", p.tensors, p.count, StepSizes{}, p.table, stream);
  const NormParams n{p.table, p.count, p.total / kOptimizerChunkCuda, p.grad_scale, p.partial, p.norm};
  launch("grad_norm", square_sums, dim3(kGradNormBlocks), dim3(kThreads), kThreads * sizeof(double), stream, n);
  launch("grad_norm", finish_norm, dim3(1), dim3(kGradNormBlocks), kGradNormBlocks * sizeof(double), stream, n);
}

}  // namespace torchweld::cuda
