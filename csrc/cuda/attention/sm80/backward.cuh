// Tiles, shared memory and the load pipeline of the kernels backward_keys, backward_queries and backward_bias on
// mma.sync.
#pragma once

#include "cuda/attention/backward.cuh"
#include "cuda/attention/sm80/products.cuh"

namespace torchweld::cuda::attention::sm80 {

// A block owns kRows rows, 16 * MT per warp, and streams tiles of kStreamed rows, up to kStages of them in flight. A
// block fits the 99 KB of shared memory of sm_86 and sm_89.
template <class T, int D, bool kPlain>
struct BackwardShape {
  static constexpr bool kFloat32 = sizeof(T) == 4;
  static constexpr int kWarps = kFloat32 && D > 128 ? 2 : 4, kThreads = kWarps * kWarpSize;
  static constexpr int MT = kPlain && !kFloat32 && D <= 64 ? 2 : 1;
  static constexpr int kRows = kWarps * MT * 16;
  static constexpr int kStreamed = D <= 64 || (D <= 128 && !kFloat32) ? 32 : 16;
  static constexpr int kStages = kFloat32 && D > 128 ? 1 : 2;
  static constexpr int kRowBytes = Tile<T, D>::kRowBytes;

  struct Stage {
    uint8_t rows[2][kStreamed * kRowBytes];  // those that make scores, those that make dP
    float2 statistics[2][kStreamed];         // softmax and gradient statistics, in backward_keys only
  };
  struct Memory {
    uint8_t own[2][kRows * kRowBytes];
    Stage stages[kStages];
  };
  struct AtomicMemory {  // where backward_keys accumulates dquery
    Memory memory;
    T dscores[kRows * kStreamed];  // the warps exchange dS^T
  };
  static constexpr int kBytes = static_cast<int>(sizeof(Memory));
  static constexpr int kAtomicBytes = static_cast<int>(sizeof(AtomicMemory));
  static_assert((kFloat32 ? kBytes : kAtomicBytes) <= 99 * 1024);
};

// The addresses in the block's shared memory.
template <class T, int D, bool kPlain>
struct BackwardMemory {
  using Shape = BackwardShape<T, D, kPlain>;
  using Memory = typename Shape::Memory;
  using Stage = typename Shape::Stage;
  using AtomicMemory = typename Shape::AtomicMemory;
  uint32_t own[2], stages;

  __device__ __forceinline__ BackwardMemory() {
    own[0] = ptx::shared_base();
    own[1] = own[0] + static_cast<uint32_t>(sizeof(Memory::own[0]));
    stages = own[0] + static_cast<uint32_t>(offsetof(Memory, stages));
  }
  __device__ __forceinline__ uint32_t own_rows(int which) const {
    return own[which] + warp() * Shape::MT * 16 * Shape::kRowBytes;
  }
  __device__ __forceinline__ uint32_t streamed(int step, int which) const {
    return stage(step) + which * static_cast<int>(sizeof(Stage::rows[0]));
  }
  __device__ __forceinline__ uint32_t statistics(int step, int which) const {
    return stage(step) + static_cast<int>(offsetof(Stage, statistics)) +
           which * static_cast<int>(sizeof(Stage::statistics[0]));
  }
  __device__ __forceinline__ uint32_t dscores() const {
    return own[0] + static_cast<uint32_t>(offsetof(AtomicMemory, dscores));
  }

  // load(step), then multiply(step), for steps 0 to steps - 1 in order. Before multiply(step) all threads see what
  // load(step) has copied. load may be called for steps past the end.
  template <class Load, class Multiply>
  __device__ __forceinline__ void pipeline(int steps, Load&& load, Multiply&& multiply) const {
#pragma unroll
    for (int step = 0; step < Shape::kStages - 1; ++step) {
      load(step);
      ptx::cp_async_commit();
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (Shape::kStages == 1) {
        __syncthreads();
        load(step);
        ptx::cp_async_commit();
      }
      ptx::cp_async_wait<Shape::kStages == 1 ? 0 : Shape::kStages - 2>();
      __syncthreads();
      if (Shape::kStages > 1) {
        load(step + Shape::kStages - 1);
        ptx::cp_async_commit();
      }
      multiply(step);
    }
  }

 private:
  __device__ __forceinline__ uint32_t stage(int step) const {
    return stages + step % Shape::kStages * static_cast<int>(sizeof(Stage));
  }
};

}  // namespace torchweld::cuda::attention::sm80
