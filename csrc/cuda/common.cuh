// What every kernel shares: the launch, the element types, 16-byte accesses, sums over warps and rows. Kernels reach
// the hardware only through CUDA's own names and these wrappers, and every launch goes through `launch`:
// tests/emulation runs the same sources on a CPU by standing in for the CUDA headers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/device.h"
#include "params.h"

namespace torchweld::cuda {

// ---- Launch

// A grid of so many blocks, of which CUDA takes 2^31 - 1.
inline dim3 grid_of(const char* name, int64_t blocks) {
  if (blocks > INT32_MAX)
    throw std::invalid_argument("[" + std::string(name) + "] grid: expected at most 2^31 - 1 blocks, but got " +
                                std::to_string(blocks) + "; split the batch");
  return dim3(static_cast<unsigned>(blocks));
}

// Enqueues kernel(params...) and throws what the launch itself reports; errors inside it surface at torch's next sync.
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

// Shared memory comes from the launch alone: one array, which a kernel lays out itself.
extern __shared__ uint4 shared_memory[];

// ---- Types

template <class T>
struct Tag {
  using type = T;
};

// f(Tag<T>) for the type behind `dtype`.
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

// f(Tag<T>, Tag<WT>) for the five pairs in use: the parameters are float32 or of the activations' type.
template <class F>
void dispatch_types(const char* op, DType dtype, DType weight_dtype, F&& f) {
  dispatch(op, dtype, [&](auto t) { weight_dtype == dtype ? f(t, t) : f(t, Tag<float>{}); });
}

// A register of 32 bits holds one float or two 16-bit elements; element `half` of it as a float.
template <class T>
__device__ __forceinline__ float unpack(uint32_t word, int half) {
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(word);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(half != 0 ? word & 0xffff0000u : word << 16);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(__ushort_as_half(static_cast<uint16_t>(half != 0 ? word >> 16 : word)));
}

// The inverse, rounding to nearest even; 16-bit types take a pair, float ignores `high`.
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

// V neighbouring elements, kept as stored: V * sizeof(T) is a multiple of 16 bytes, moved 16 at a time, or V is 1.
// CUDA's load and store functions keep the width; the compiler now and then splits a plain uint4 into four accesses.
template <class T, int V>
struct Run {
  static constexpr bool kPairs = V > 1 && sizeof(T) == 2;
  static constexpr int kWords = kPairs ? V / 2 : V;
  static_assert(V == 1 || V * sizeof(T) % 16 == 0, "a run is one element or whole 16-byte packets");
  uint32_t words[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    return kPairs ? unpack<T>(words[i / 2], i % 2) : unpack<T>(words[i], 0);
  }

  // Element i becomes f(i).
  template <class F>
  __device__ __forceinline__ void set(F&& f) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = kPairs ? pack<T>(f(2 * i), f(2 * i + 1)) : pack<T>(f(i), 0.0f);
  }

  // For what no thread writes while the kernel runs, and many read.
  __device__ __forceinline__ void load(const T* p) {
    move(p, [](const auto* from) { return __ldg(from); });
  }

  // For what is read once: first to leave the caches, so that it does not push out what is read again.
  __device__ __forceinline__ void load_once(const T* p) {
    move(p, [](const auto* from) { return __ldcs(from); });
  }

  // For what this thread may have written.
  __device__ __forceinline__ void reload(const T* p) {
    move(p, [](const auto* from) { return __ldca(from); });
  }

  __device__ __forceinline__ void store(T* p) const {
    if constexpr (V > 1) {
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
    if constexpr (V > 1) {
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

// Whether every pointer (nullptr counts) can be accessed 16 bytes at a time.
template <class... Pointers>
bool aligned16(const Pointers*... pointers) {
  return (uintptr_t{0} | ... | reinterpret_cast<uintptr_t>(pointers)) % 16 == 0;
}

// ---- Sums

// Over groups of `width` neighbouring lanes (a power of two, at most 32); every lane gets the same bits.
__device__ __forceinline__ float group_sum(float v, int width) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    if (offset < width) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

}  // namespace torchweld::cuda
