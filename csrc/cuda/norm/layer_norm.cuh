// How the threads of a block share a row of a layer norm, in both directions. A block has blockDim.y rows of blockDim.x
// lanes; lanes are a power of two up to a warp, or whole warps.
#pragma once

#include "cuda/common.cuh"
#include "philox.h"

namespace torchweld::cuda::norm {

// Calls f(std::integral_constant<int, V>): V elements are a 16-byte vector where every row begins on 16 bytes, else 1.
template <class T, class F>
void dispatch_width(bool vectorized, F&& f) {
  vectorized ? f(std::integral_constant<int, 16 / sizeof(T)>{}) : f(std::integral_constant<int, 1>{});
}

template <class T, class... Pointers>
bool can_vectorize(int64_t cols, const Pointers*... pointers) {
  return cols % (16 / sizeof(T)) == 0 && aligned16(pointers...);
}

// Calls f(Tag<T>, Tag<R>, Tag<WT>). Residual and sum (R) and the parameters (WT) are float32 or of the type of the
// activations (T).
template <class Params, class F>
void dispatch_norm(const char* op, const Params& p, F&& f) {
  dispatch_types(op, p.dtype, p.weight_dtype,
                 [&](auto t, auto wt) { p.sum_dtype == p.dtype ? f(t, t, wt) : f(t, Tag<float>{}, wt); });
}

// The defaults that the kernels rely on: without dropout the scale is 1, without weight the offset is 0.
template <class Params>
Params with_defaults(Params p) {
  if (p.dropout.seed == nullptr) p.dropout.scale = 1.0f;
  if (p.weight == nullptr) p.weight_offset = 0.0f;
  return p;
}

// How many lanes a row takes: a power of two up to a warp, or whole warps.
inline int lanes_for(int64_t cols, int columns_per_lane) {
  const int64_t wanted = (cols + columns_per_lane - 1) / columns_per_lane;
  if (wanted > kWarpSize) return static_cast<int>((wanted + kWarpSize - 1) / kWarpSize * kWarpSize);
  int lanes = 1;
  while (lanes < wanted) lanes *= 2;
  return lanes;
}

// One thread's E columns of a row, in vectors of V neighbours. A warp owns 32 * E columns in a row, and the vectors of
// its lanes alternate, so every access of a warp touches neighbouring memory. Lanes of less than a warp alternate over
// the whole row.
template <int E, int V>
struct Columns {
  int start, stride, count;  // vector c begins at start + c * stride; `count` columns exist, 0 past the last row

  // For rows of whole warps: the offset of vector c is a compile-time constant.
  static __device__ __forceinline__ Columns of_warps(int64_t count) {
    const int lane = static_cast<int>(threadIdx.x);
    return {lane / kWarpSize * kWarpSize * E + lane % kWarpSize * V, kWarpSize * V, static_cast<int>(count)};
  }

  // For rows of any number of lanes.
  static __device__ __forceinline__ Columns of_lanes(int64_t count) {
    const int lanes = static_cast<int>(blockDim.x);
    return {of_warps(count).start, (lanes < kWarpSize ? lanes : kWarpSize) * V, static_cast<int>(count)};
  }

  __device__ __forceinline__ int first(int c) const { return start + c * stride; }
  __device__ __forceinline__ bool has(int c) const { return first(c) < count; }
};

// One thread's E columns of a row, as stored. Missing columns are zero.
template <class T, int E, int V>
struct Slice {
  static constexpr int kVectors = E / V, kWords = kVectors * Vector<T, V>::kWords;
  Vector<T, V> vectors[kVectors];

  __device__ __forceinline__ void reload(const T* row, Columns<E, V> own) {
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      vectors[c] = {};
      if (own.has(c)) vectors[c].reload(row + own.first(c));
    }
  }

  __device__ __forceinline__ void load_once(const T* row, Columns<E, V> own) {
#pragma unroll
    for (int c = 0; c < kVectors; ++c) {
      vectors[c] = {};
      if (own.has(c)) vectors[c].load_once(row + own.first(c));
    }
  }

  __device__ __forceinline__ void store(T* row, Columns<E, V> own) const {
#pragma unroll
    for (int c = 0; c < kVectors; ++c)
      if (own.has(c)) vectors[c].store(row + own.first(c));
  }
};

// The dropout mask of one thread's columns of a row, one bit each. It is computed before the row is loaded, while
// registers are free. Without dropout all bits are 1. The scale stays in the constant memory of the parameters.
template <int E, int V>
struct DropoutMask {
  static_assert(E <= 32);
  uint32_t kept = 0xffffffffu;

  __device__ __forceinline__ DropoutMask(const Dropout& dropout, int64_t row, int64_t column, Columns<E, V> own) {
    if (dropout.seed == nullptr) return;
    constexpr int kStep = V < 4 ? V : 4;  // columns per call of the generator
    const auto seed = static_cast<uint64_t>(*dropout.seed);
    kept = 0;
#pragma unroll 1
    for (int e = 0; e < E; e += kStep) {
      const int64_t first = column + own.first(e / V) + e % V;
      const auto words = philox::words(seed, static_cast<uint64_t>(row), static_cast<uint32_t>(first / 4));
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (V >= 4 || first % 4 == k) kept |= (words.word[k] < dropout.drop ? 0u : 1u) << (V < 4 ? e : e + k);
    }
  }

  __device__ __forceinline__ float operator()(int e, float v, const Dropout& dropout) const {
    return v * (kept >> e & 1 ? dropout.scale : 0.0f);
  }
};

// Sums over a row, in the first bytes of shared memory. The warps of a row alternate between two buffers, so one
// barrier per sum is enough: a warp that writes a buffer again has passed the barrier of the other buffer.
template <int kMost>
class RowSums {
 public:
  static __host__ __device__ int floats(int threads) { return 2 * kMost * (threads / kWarpSize); }

  // Sums K values over the lanes of each row of the block, in one order. Every lane gets the same bits.
  template <int K>
  __device__ __forceinline__ void operator()(float (&v)[K]) {
    static_assert(K <= kMost);
    const int lanes = static_cast<int>(blockDim.x);
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = group_sum(v[k], lanes);
    if (lanes <= kWarpSize) return;
    const int warps = lanes / kWarpSize, rows = static_cast<int>(blockDim.y);
    float* row = reinterpret_cast<float*>(shared_memory) + (place_ * rows + threadIdx.y) * warps * kMost;
    if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) row[threadIdx.x / kWarpSize * K + k] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = row[k];
    for (int w = 1; w < warps; ++w) {
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] += row[w * K + k];
    }
    place_ ^= 1;
  }

 private:
  int place_ = 0;
};

}  // namespace torchweld::cuda::norm
