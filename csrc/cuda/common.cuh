// What every kernel shares: the launch, element types, 16-byte accesses, sums over warps and blocks. Kernels reach the
// hardware only through CUDA's own names and these wrappers, and every launch goes through launch(): tests/emulation
// runs the same sources on a CPU with its own CUDA headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/device.h"
#include "params/types.h"

namespace torchweld::cuda {

// ---- Launch

// A grid of this many blocks. CUDA takes at most 2^31 - 1.
inline dim3 grid_of(const char* name, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::invalid_argument("[" + std::string(name) + "] grid: expected at most 2^31 - 1 blocks, but got " +
                                std::to_string(blocks) + "; split the batch");
  return dim3(static_cast<unsigned>(blocks));
}

// Enqueues kernel(params...) and throws if the launch fails. Errors inside the kernel surface when torch next waits.
template <class... Params>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, Stream stream,
            const std::remove_const_t<Params>&... params) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared > kWithoutAsking)
    check(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  check(name, cudaLaunchKernelEx(&config, kernel, params...));
}

constexpr int kWarpSize = 32;

// All shared memory comes from the launch: one array, which each kernel lays out itself.
extern __shared__ uint4 shared_memory[];

// ---- Numbers

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// A row's maximum as a number to subtract: -inf - -inf would be NaN.
__device__ __forceinline__ float finite_or_zero(float max) { return max == -infinity() ? 0.0f : max; }

// ---- Types

// Calls f(Tag<T>) for the type behind `dtype`.
template <class F>
void dispatch(const char* op, DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(Tag<float>{});
    case DType::bfloat16:
      return f(Tag<__nv_bfloat16>{});
    case DType::float16:
      return f(Tag<__half>{});
  }
  throw std::invalid_argument("[" + std::string(op) + "] dtype: expected float32, bfloat16 or float16, but got code " +
                              std::to_string(static_cast<int>(dtype)));
}

// Calls f(Tag<T>, Tag<WT>): parameters are float32 or of the type of the activations.
template <class F>
void dispatch_types(const char* op, DType dtype, DType weight_dtype, F&& f) {
  dispatch(op, dtype, [&](auto t) { weight_dtype == dtype ? f(t, t) : f(t, Tag<float>{}); });
}

// Element `half` of a 32-bit register, which holds one float or two 16-bit elements, as a float.
template <class T>
__device__ __forceinline__ float unpack(uint32_t word, int half) {
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(word);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(half != 0 ? word & 0xffff0000u : word << 16);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<uint16_t>(half != 0 ? word >> 16 : word)));
}

// The inverse, rounding to nearest even. 16-bit types take a pair; float ignores `high`.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(low);
  } else {
    uint32_t word;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      std::memcpy(&word, &pair, sizeof(word));
    } else {
      const __half2 pair = __floats2half2_rn(low, high);
      std::memcpy(&word, &pair, sizeof(word));
    }
    return word;
  }
}

// ---- Accesses

// Element `index` of the array of T at `base`.
template <class T>
__device__ __forceinline__ const T* at(const void* base, int64_t index) {
  return static_cast<const T*>(base) + index;
}
template <class T>
__device__ __forceinline__ T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}

// V neighbouring elements, as stored. V is 1, or V * sizeof(T) is a multiple of 16 bytes, which are accessed 16 at a
// time, or 8 bytes. CUDA's load and store functions keep this width; the compiler sometimes splits a plain uint4 into
// four accesses.
template <class T, int V>
struct Vector {
  static constexpr int kSize = V;
  static constexpr bool kPairs = V > 1 && sizeof(T) == 2;
  static constexpr int kWords = kPairs ? V / 2 : V;
  static_assert(V == 1 || V * sizeof(T) % 16 == 0 || V * sizeof(T) == 8,
                "a vector is one element, 8 bytes, or a multiple of 16 bytes");
  uint32_t words[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    return kPairs ? unpack<T>(words[i / 2], i % 2) : unpack<T>(words[i], 0);
  }

  // Sets element i to f(i).
  template <class F>
  __device__ __forceinline__ void set(F&& f) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = kPairs ? pack<T>(f(2 * i), f(2 * i + 1)) : pack<T>(f(i), 0.0f);
  }

  // For memory that no thread writes while the kernel runs, and that many read.
  __device__ __forceinline__ void load(const T* p) {
    move(p, [](const auto* from) { return __ldg(from); });
  }

  // For memory that is read once: it leaves the caches first.
  __device__ __forceinline__ void load_once(const T* p) {
    move(p, [](const auto* from) { return __ldcs(from); });
  }

  // For memory that this thread may have written.
  __device__ __forceinline__ void reload(const T* p) {
    move(p, [](const auto* from) { return __ldca(from); });
  }

  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kWords == 2) {
      __stwb(reinterpret_cast<uint2*>(p), make_uint2(words[0], words[1]));
    } else if constexpr (V > 1) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4)
        __stwb(reinterpret_cast<uint4*>(p) + i / 4, make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    } else if constexpr (sizeof(T) == 4) {
      __stwb(reinterpret_cast<uint32_t*>(p), words[0]);
    } else {
      __stwb(reinterpret_cast<uint16_t*>(p), static_cast<uint16_t>(words[0]));
    }
  }

 private:
  template <class F>
  __device__ __forceinline__ void move(const T* p, F&& read) {
    if constexpr (kWords == 2) {
      const uint2 packet = read(reinterpret_cast<const uint2*>(p));
      words[0] = packet.x, words[1] = packet.y;
    } else if constexpr (V > 1) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 packet = read(reinterpret_cast<const uint4*>(p) + i / 4);
        words[i] = packet.x, words[i + 1] = packet.y, words[i + 2] = packet.z, words[i + 3] = packet.w;
      }
    } else if constexpr (sizeof(T) == 4) {
      words[0] = read(reinterpret_cast<const uint32_t*>(p));
    } else {
      words[0] = read(reinterpret_cast<const uint16_t*>(p));
    }
  }
};

// True if every pointer (nullptr too) is a multiple of 16 bytes.
template <class... Pointers>
bool aligned16(const Pointers*... pointers) {
  return (uintptr_t{0} | ... | reinterpret_cast<uintptr_t>(pointers)) % 16 == 0;
}

// ---- Sums over lanes

// f over each group of `width` neighbouring lanes (a power of two, at most 32). Every lane gets the same bits.
template <class F>
__device__ __forceinline__ float group_reduce(float v, int width, F&& f) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    if (offset < width) v = f(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

__device__ __forceinline__ float group_sum(float v, int width) {
  return group_reduce(v, width, [](float a, float b) { return a + b; });
}

// The sum of v over a block of `threads` (a power of two), in a fixed order. Thread 0 gets it, the others 0. Uses
// `threads` doubles of shared memory, which may be reused after a __syncthreads().
__device__ __forceinline__ double block_sum(double v, int threads) {
  double* sums = reinterpret_cast<double*>(shared_memory);
  sums[threadIdx.x] = v;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return threadIdx.x == 0 ? sums[0] : 0.0;
}

// ---- Rows. A block has blockDim.y rows of blockDim.x lanes; lanes are a power of two up to a warp, or whole warps.

// How many lanes a row takes: a power of two up to a warp, or whole warps.
inline int lanes_for(int64_t cols, int columns_per_lane) {
  const int64_t wanted = (cols + columns_per_lane - 1) / columns_per_lane;
  if (wanted > kWarpSize) return static_cast<int>((wanted + kWarpSize - 1) / kWarpSize * kWarpSize);
  int lanes = 1;
  while (lanes < wanted) lanes *= 2;
  return lanes;
}

// Sums and maxima over a row, in the first bytes of shared memory. The warps of a row alternate between two buffers, so
// one barrier per sum is enough: a warp that writes a buffer again has passed the barrier of the other buffer.
template <int kMost>
class RowSums {
 public:
  static __host__ __device__ int floats(int threads) { return 2 * kMost * (threads / kWarpSize); }

  // Sums K values over the lanes of each row of the block, in one order. Every lane gets the same bits.
  template <int K>
  __device__ __forceinline__ void operator()(float (&v)[K]) {
    reduce(v, [](float a, float b) { return a + b; });
  }

  // The largest value. A NaN is lost.
  __device__ __forceinline__ float max(float v) {
    float values[1] = {v};
    reduce(values, [](float a, float b) { return fmaxf(a, b); });
    return values[0];
  }

 private:
  template <int K, class F>
  __device__ __forceinline__ void reduce(float (&v)[K], F&& f) {
    static_assert(K <= kMost);
    const int lanes = static_cast<int>(blockDim.x);
    auto within_warp = [&](int width) {
#pragma unroll
      for (int k = 0; k < K; ++k) v[k] = group_reduce(v[k], width, f);
    };
    if (lanes < kWarpSize) return within_warp(lanes);
    within_warp(kWarpSize);  // a constant: no branch per shuffle
    if (lanes == kWarpSize) return;
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
      for (int k = 0; k < K; ++k) v[k] = f(v[k], row[w * K + k]);
    }
    place_ ^= 1;
  }

  int place_ = 0;
};

}  // namespace torchweld::cuda
