// How the lanes of a row share its columns (common.cuh: "Rows"), in both directions of a layer norm.
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

// Calls f(Tag<T>, Tag<R>). Residual and sum (R) are float32 or of the type of the activations (T).
template <class Params, class F>
void dispatch_norm(const char* op, const Params& p, F&& f) {
  dispatch_types(op, p.dtype, p.sum_dtype, f);
}

// V parameters from `column` on. They are float32 or of the type of the activations: a branch at run time, where a
// template argument would double the kernels and save no register.
template <class T, int V>
__device__ __forceinline__ Vector<float, V> load_parameters(const void* base, DType dtype, int64_t column) {
  Vector<float, V> wide;
  if (std::is_same_v<T, float> || dtype == DType::float32) {
    wide.load(at<float>(base, column));
  } else {
    Vector<T, V> narrow;
    narrow.load(at<T>(base, column));
    wide.set([&](int i) { return narrow[i]; });
  }
  return wide;
}

// The defaults that the kernels rely on: without dropout the scale is 1, without weight the offset is 0.
template <class Params>
Params with_defaults(Params p) {
  if (p.dropout.seed == nullptr) p.dropout.scale = 1.0f;
  if (p.weight == nullptr) p.weight_offset = 0.0f;
  return p;
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

}  // namespace torchweld::cuda::norm
