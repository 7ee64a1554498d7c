// Cross-entropy of class indices, by row of V logits. The formulas are in cpu/loss/cross_entropy.cpp.
//
// forward   Lanes share a row. Each keeps the maximum of its logits and the sum of exp(logit - maximum), and rescales
//           the sum where the maximum grows: logits are read once. Label smoothing reads the row again, from L2 as far
//           as it fits. Grid -> groups of blockDim.y rows.
// backward  Grid -> (groups of blockDim.y rows, tiles of a row). A lane owns kBackwardVectors vectors of a tile.
//
// Logits are accessed 16 bytes at a time whatever the length of a row: elements before its first multiple of 16 bytes
// and after its last are accessed one by one. The backward needs logits and gradient at the same distance from such a
// multiple, or it accesses all elements one by one. Bytes per logit, s being those of a value: s forward, 2s backward.
// Milakov, Gimelshein: Online normalizer calculation for softmax, arXiv:1805.02867.

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

namespace torchweld::cuda::loss {
namespace {

constexpr int kShortRow = 256, kShortSlice = 8, kSlice = 32;  // logits per lane, at least, until lanes are kMaxLanes
constexpr int kMaxLanes = 512, kThreads = 256;  // lanes of a row, forward; threads of a block of shorter rows
constexpr int kForwardVectors = 4, kBackwardVectors = 2;
constexpr unsigned kMostTiles = 65535;  // in the second dimension of a grid

// A row in memory: `head` elements, `vectors` of V elements at multiples of 16 bytes, and the rest from `tail` on.
template <class T, int V>
struct Parts {
  int64_t head, vectors, tail;

  __device__ __forceinline__ Parts(const T* row, int64_t count) {
    const int64_t before = V > 1 ? (0 - reinterpret_cast<uintptr_t>(row)) % 16 / sizeof(T) : 0;
    head = before < count ? before : count;
    vectors = (count - head) / V;
    tail = head + vectors * V;
  }
};

__device__ __forceinline__ float weight_of(float logit, float max) { return ptx::exp2((logit - max) * kLog2e); }

// The largest of the logits that a lane has seen, and the sum of their weights. A NaN is in the sum alone.
struct OnlineSum {
  float max = -infinity(), sum = 0.0f;

  template <class T, int V, int N>
  __device__ __forceinline__ void add(const Vector<T, V> (&x)[N]) {
    float largest = max;
#pragma unroll
    for (int i = 0; i < N * V; ++i) largest = fmaxf(largest, x[i / V][i % V]);
    const float from = finite_or_zero(largest);
    sum *= weight_of(max, from);
    max = largest;
#pragma unroll
    for (int i = 0; i < N * V; ++i) sum += weight_of(x[i / V][i % V], from);
  }
};

// f(N vectors) for all elements of a row that this lane owns.
template <int N, int V, class T, class F>
__device__ __forceinline__ void load_at(const T* x, int stride, F&& f) {
  Vector<T, V> vectors[N];
#pragma unroll
  for (int c = 0; c < N; ++c) vectors[c].load(x + c * stride);
  f(vectors);
}

template <int V, class T, class F>
__device__ __forceinline__ void for_each(const T* row, int64_t count, F&& f) {
  const Parts<T, V> parts(row, count);
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int64_t i = lane; i < parts.head; i += lanes) load_at<1, 1>(row + i, 0, f);
  const T* first = row + parts.head;
  int64_t i = lane;
#pragma unroll 1
  for (; i + (kForwardVectors - 1) * lanes < parts.vectors; i += kForwardVectors * lanes)
    load_at<kForwardVectors, V>(first + i * V, lanes * V, f);
#pragma unroll 1
  for (; i < parts.vectors; i += lanes) load_at<1, V>(first + i * V, 0, f);
#pragma unroll 1
  for (i = parts.tail + lane; i < count; i += lanes) load_at<1, 1>(row + i, 0, f);
}

template <class T, int V>
__global__ void __launch_bounds__(kMaxLanes) forward(const __grid_constant__ CrossEntropyForwardParams p) {
  const int64_t m = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, count = m < p.rows ? p.classes : 0;
  const T* row = at<T>(p.logits, count > 0 ? m * p.classes : 0);
  const int64_t target = threadIdx.x == 0 && count > 0 ? p.target[m] : p.ignore_index;
  if (target != p.ignore_index && (target < 0 || target >= count))
    ptx::refuse("0 <= target && target < classes", "cross_entropy");
  RowSums<1> over_row;

  // Maximum and sum.
  OnlineSum own;
  for_each<V>(row, count, [&](const auto& x) { own.add(x); });
  const float max = over_row.max(own.max);
  float sum[1] = {own.sum * weight_of(own.max, finite_or_zero(max))};
  over_row(sum);
  if (max == -infinity()) sum[0] = max - max;  // NaN: the row has no probabilities

  // Mean of logits - maximum.
  float mean[1] = {};
  if (p.smoothing > 0.0f) {
    const float share = 1.0f / static_cast<float>(p.classes);  // divides each term: the sum of all terms may overflow
    for_each<V>(row, count, [&](const auto& x) {
#pragma unroll
      for (const auto& vector : x)
#pragma unroll
        for (int k = 0; k < vector.kSize; ++k) mean[0] += (vector[k] - max) * share;
    });
    over_row(mean);
  }

  // Loss.
  if (threadIdx.x > 0 || m >= p.rows) return;
  p.max[m] = max;
  p.sum[m] = sum[0];
  if (target == p.ignore_index) {
    p.loss[m] = 0.0f;
    return;
  }
  Vector<T, 1> picked;
  picked.load(row + target);
  const float log_sum = logf(sum[0]), loss = log_sum - (picked[0] - max);
  p.loss[m] = p.smoothing > 0.0f ? (1.0f - p.smoothing) * loss + p.smoothing * (log_sum - mean[0]) : loss;
}

struct Backward : CrossEntropyBackwardParams {
  float others, own;  // the target probabilities of a class and of the target
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ Backward p) {
  const int64_t m = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (m >= p.rows) return;
  const T* row = at<T>(p.logits, m * p.classes);
  T* drow = at<T>(p.dlogits, m * p.classes);
  const Parts<T, V> parts(row, p.classes);
  const int lanes = static_cast<int>(blockDim.x), lane = static_cast<int>(threadIdx.x);

  // A row without a target has the gradient 0, or NaN where it has no probabilities, as in torch.
  const int64_t target = p.target[m];
  const bool ignored = target == p.ignore_index;
  const float max = p.max[m], sum = p.sum[m], dloss = ignored ? 1.0f : p.dloss[m];
  const float inverse = ignored ? 0.0f : __frcp_rn(sum), others = ignored ? sum * 0.0f : p.others;

  const auto store_gradient = [&](const auto& x, int64_t first) {
    using Vector = std::decay_t<decltype(x)>;
    Vector gradient;
    const bool holds_target = !ignored && target >= first && target - first < Vector::kSize;
    const int place = holds_target ? static_cast<int>(target - first) : -1;
    gradient.set([&](int k) {
      const float other = k == place ? p.own : others;
      return (weight_of(x[k], max) * inverse - other) * dloss;
    });
    gradient.store(drow + first);
  };
  const auto single = [&](int64_t i) {
    Vector<T, 1> x;
    x.load_once(row + i);
    store_gradient(x, i);
  };
  for (int64_t tile = blockIdx.y; tile == blockIdx.y || tile * kBackwardVectors * lanes < parts.vectors;
       tile += gridDim.y) {
    const int64_t first = tile * kBackwardVectors * lanes + lane;
    Vector<T, V> x[kBackwardVectors];
#pragma unroll
    for (int c = 0; c < kBackwardVectors; ++c)
      if (first + c * lanes < parts.vectors) x[c].load_once(row + parts.head + (first + c * lanes) * V);
#pragma unroll
    for (int c = 0; c < kBackwardVectors; ++c)
      if (first + c * lanes < parts.vectors) store_gradient(x[c], parts.head + (first + c * lanes) * V);
  }
  if (V == 1 || blockIdx.y > 0) return;
#pragma unroll 1
  for (int64_t i = lane; i < parts.head; i += lanes) single(i);
#pragma unroll 1
  for (int64_t i = parts.tail + lane; i < p.classes; i += lanes) single(i);
}

// Lanes of at least `slice` logits each, and as many rows as fit the block.
dim3 block_for(int64_t classes, int slice, int most_lanes) {
  const int lanes = std::min(lanes_for(classes, slice), most_lanes);
  return dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(std::max(1, kThreads / lanes)));
}

}  // namespace
}  // namespace torchweld::cuda::loss

namespace torchweld::cuda {

void cross_entropy_forward(const CrossEntropyForwardParams& p, Stream stream) {
  using namespace loss;
  constexpr const char* kName = "cross_entropy_forward";
  if (p.rows == 0) return;
  const dim3 block = block_for(p.classes, p.classes > kShortRow ? kSlice : kShortSlice, kMaxLanes);
  const size_t shared = RowSums<1>::floats(static_cast<int>(block.x * block.y)) * sizeof(float);
  const dim3 grid = grid_of(kName, (p.rows + block.y - 1) / block.y);
  dispatch(kName, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    launch(kName, forward<T, 16 / sizeof(T)>, grid, block, shared, stream, p);
  });
}

void cross_entropy_backward(const CrossEntropyBackwardParams& params, Stream stream) {
  using namespace loss;
  constexpr const char* kName = "cross_entropy_backward";
  if (params.rows == 0) return;
  // With one class the probability of the target is 1, and the gradient exactly 0.
  const double smoothing = params.smoothing, other = smoothing / static_cast<double>(params.classes);
  const Backward p{params, static_cast<float>(other), static_cast<float>(1.0 - smoothing + other)};
  dispatch(kName, p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int kWidth = 16 / sizeof(T);
    const auto distance = reinterpret_cast<uintptr_t>(p.logits) - reinterpret_cast<uintptr_t>(p.dlogits);
    const bool vectorized = distance % 16 == 0;
    const int slice = kBackwardVectors * (vectorized ? kWidth : 1);
    const dim3 block = block_for(p.classes, slice, kThreads);
    const int64_t tile = int64_t{slice} * block.x;
    dim3 grid = grid_of(kName, (p.rows + block.y - 1) / block.y);
    grid.y = static_cast<unsigned>(std::min<int64_t>((p.classes + tile - 1) / tile, kMostTiles));
    launch(kName, vectorized ? backward<T, kWidth> : backward<T, 1>, grid, block, 0, stream, p);
  });
}

}  // namespace torchweld::cuda
