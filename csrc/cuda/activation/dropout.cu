// Dropout: output = input * factor, the factor of (row, column) 0 or 1 / (1 - p) (philox.h). The backward is the same,
// of the gradient. Grid -> tiles of kTile vectors. A thread owns kVectors vectors of 16 bytes, kThreads apart, and
// loads all of them before it computes. Where a row does not begin on 16 bytes, a vector is one element. One value read
// and one written.

#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace torchweld::cuda::activation {
namespace {

constexpr int kThreads = 256, kVectors = 2, kTile = kThreads * kVectors;

// Index: a number of elements, which 32 bits hold nearly always: a division of 64 bits takes as long as the random
// bits.
template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads) drop(const __grid_constant__ DropoutParams p) {
  const int64_t first = blockIdx.x * int64_t{kTile} + threadIdx.x, vectors = p.rows * p.cols / V;
  const auto seed = static_cast<uint64_t>(*p.dropout.seed);

  // Load.
  Vector<T, V> x[kVectors];
#pragma unroll
  for (int c = 0; c < kVectors; ++c)
    if (first + c * kThreads < vectors) x[c].load_once(at<T>(p.input, (first + c * kThreads) * V));

  // Drop, store.
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    if (first + c * kThreads >= vectors) break;
    const int64_t element = (first + c * kThreads) * V;
    const Index row = static_cast<Index>(element) / static_cast<Index>(p.cols),
                column = static_cast<Index>(element) % static_cast<Index>(p.cols);
    uint32_t words[V < 4 ? 4 : V];
#pragma unroll
    for (int k = 0; k < V; k += 4) {
      const auto four = philox::words(seed, row, static_cast<uint32_t>((column + k) / 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) words[k + i] = four.word[i];
    }
    if (V == 1) {
#pragma unroll
      for (int i = 1; i < 4; ++i)
        if (column % 4 == static_cast<Index>(i)) words[0] = words[i];
    }
    Vector<T, V> y;
    y.set([&](int i) { return x[c][i] * (words[i] < p.dropout.drop ? 0.0f : p.dropout.scale); });
    y.store(at<T>(p.output, element));
  }
}

template <class T, int V>
void launch_drop(const DropoutParams& p, Stream stream) {
  const int64_t tile = int64_t{kTile} * V, numel = p.rows * p.cols;
  const dim3 grid = grid_of("dropout", (numel + tile - 1) / tile);
  launch("dropout", numel <= UINT32_MAX ? drop<T, V, uint32_t> : drop<T, V, uint64_t>, grid, dim3(kThreads), 0, stream,
         p);
}

}  // namespace
}  // namespace torchweld::cuda::activation

namespace torchweld::cuda {

void dropout(const DropoutParams& p, Stream stream) {
  using namespace activation;
  if (p.rows == 0 || p.cols == 0) return;
  dispatch("dropout", p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int V = 16 / sizeof(T);
    if (p.cols % V == 0 && aligned16(p.input, p.output))
      launch_drop<T, V>(p, stream);
    else
      launch_drop<T, 1>(p, stream);
  });
}

}  // namespace torchweld::cuda
