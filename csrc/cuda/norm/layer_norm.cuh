// How a row of a layer norm is shared out among threads, in both directions. A block is blockDim.y rows of blockDim.x
// lanes; lanes are a power of two up to a warp, or whole warps.
#pragma once

#include "cuda/common.cuh"
#include "philox.h"

namespace torchweld::cuda {

constexpr int kWarp = 32;

// f(std::integral_constant<int, V>): whole 16-byte packets where every row starts on one, else single elements.
template <class T, class F>
void dispatch_width(bool packets, F&& f) {
  packets ? f(std::integral_constant<int, 16 / sizeof(T)>{}) : f(std::integral_constant<int, 1>{});
}

template <class T, class... Pointers>
bool in_packets(int64_t cols, const Pointers*... pointers) {
  return cols % (16 / sizeof(T)) == 0 && aligned16(pointers...);
}

// f(Tag<T>, Tag<R>, Tag<WT>): residual and sum, like the parameters, are float32 or of the activations' type.
template <class Params, class F>
void dispatch_norm(const char* op, const Params& p, F&& f) {
  dispatch_types(op, p.dtype, p.weight_dtype,
                 [&](auto t, auto wt) { p.sum_dtype == p.dtype ? f(t, t, wt) : f(t, Tag<float>{}, wt); });
}

// What the kernels take for granted: without dropout the scale is 1, without weight the offset is 0.
template <class Params>
Params normalised(Params p) {
  if (p.dropout.seed == nullptr) p.dropout.scale = 1.0f;
  if (p.weight == nullptr) p.weight_offset = 0.0f;
  return p;
}

// How many lanes a row takes: a power of two up to a warp, or whole warps.
inline int lanes_for(int64_t cols, int columns_per_lane) {
  const int64_t wanted = (cols + columns_per_lane - 1) / columns_per_lane;
  if (wanted > kWarp) return static_cast<int>((wanted + kWarp - 1) / kWarp * kWarp);
  int lanes = 1;
  while (lanes < wanted) lanes *= 2;
  return lanes;
}

template <class T>
__device__ __forceinline__ const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}
template <class T>
__device__ __forceinline__ T* at(void* base, int64_t offset) {
  return static_cast<T*>(base) + offset;
}

// One thread's E columns of a row, in runs of V neighbours: a warp owns 32 * E columns in a piece and its lanes take
// turns, so every access of a warp touches neighbouring memory. Lanes of less than a warp take turns over the whole
// row.
template <int E, int V>
struct Columns {
  int start, stride, count;  // run c begins at start + c * stride; `count` columns exist: none of a row past the end

  // Rows of whole warps: run c is at a distance known at compile time.
  static __device__ __forceinline__ Columns of_warps(int64_t count) {
    const int lane = static_cast<int>(threadIdx.x);
    return {lane / kWarp * kWarp * E + lane % kWarp * V, kWarp * V, static_cast<int>(count)};
  }

  // Rows of any number of lanes.
  static __device__ __forceinline__ Columns of_lanes(int64_t count) {
    const int lanes = static_cast<int>(blockDim.x);
    return {of_warps(count).start, (lanes < kWarp ? lanes : kWarp) * V, static_cast<int>(count)};
  }

  __device__ __forceinline__ int first(int c) const { return start + c * stride; }
  __device__ __forceinline__ bool has(int c) const { return first(c) < count; }
};

// One thread's E columns of a row, as stored; columns that do not exist are zero.
template <class T, int E, int V>
struct Slice {
  static constexpr int kRuns = E / V, kWords = kRuns * Run<T, V>::kWords;
  Run<T, V> runs[kRuns];

  __device__ __forceinline__ void reload(const T* row, Columns<E, V> own) {
#pragma unroll
    for (int c = 0; c < kRuns; ++c) {
      runs[c] = {};
      if (own.has(c)) runs[c].reload(row + own.first(c));
    }
  }

  __device__ __forceinline__ void load_once(const T* row, Columns<E, V> own) {
#pragma unroll
    for (int c = 0; c < kRuns; ++c) {
      runs[c] = {};
      if (own.has(c)) runs[c].load_once(row + own.first(c));
    }
  }

  __device__ __forceinline__ void store(T* row, Columns<E, V> own) const {
#pragma unroll
    for (int c = 0; c < kRuns; ++c)
      if (own.has(c)) runs[c].store(row + own.first(c));
  }
};

// What a dropout leaves of one thread's columns of a row: a bit each, made before the row is loaded, when the registers
// are free for it. Without dropout all of them. The scale and such stay in the constant memory of the parameters.
template <int E, int V>
struct Mask {
  static_assert(E <= 32);
  uint32_t kept = 0xffffffffu;

  __device__ __forceinline__ Mask(const Dropout& dropout, int64_t row, int64_t column, Columns<E, V> own) {
    if (dropout.seed == nullptr) return;
    constexpr int kStep = V < 4 ? V : 4;  // columns that one call of the generator serves
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

// The sums over a row, for a whole kernel, in the first bytes of shared memory. A row's warps meet there in two places
// by turns, so that one barrier per sum is enough: who writes a place again has passed the barrier of the other one.
template <int kMost>
class RowSums {
 public:
  static __host__ __device__ int floats(int threads) { return 2 * kMost * (threads / kWarp); }

  // Sums of K values over the lanes of each row of the block, in one order: every lane gets the same bits.
  template <int K>
  __device__ __forceinline__ void operator()(float (&v)[K]) {
    static_assert(K <= kMost);
    const int lanes = static_cast<int>(blockDim.x);
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = group_sum(v[k], lanes);
    if (lanes <= kWarp) return;
    const int warps = lanes / kWarp, rows = static_cast<int>(blockDim.y);
    float* row = reinterpret_cast<float*>(shared_memory) + (place_ * rows + threadIdx.y) * warps * kMost;
    if (threadIdx.x % kWarp == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) row[threadIdx.x / kWarp * K + k] = v[k];
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

}  // namespace torchweld::cuda
