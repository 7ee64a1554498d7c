// What the kernels backward_keys and backward_queries on Hopper share (attention/backward.cuh lists the kernels).
//
// A block owns 64 rows per warpgroup in shared memory. Tiles of the other rows are streamed through slots that one more
// warpgroup fills. The products for the scores and for dP of a tile run together, and the probabilities are computed
// beside dP. While one warpgroup waits, the other uses the tensor cores.
#pragma once

#include "cuda/attention/backward.cuh"
#include "cuda/attention/sm90/pipeline.cuh"

namespace torchweld::cuda::attention::sm90 {

// Item 2n holds tile n of the streamed rows that make scores, item 2n + 1 tile n of those that make dP. Each item
// carries the softmax or gradient statistics of its rows.
template <int D, int kStreamed_>
struct BackwardShape {
  static constexpr int kGroups = 2, kThreads = (1 + kGroups) * kWarpgroup, kRows = kGroups * 64;
  static constexpr int kStreamed = kStreamed_, kSlots = D <= 128 ? (kStreamed <= 64 ? 6 : 4) : 3;
  static constexpr int kRegisters = 240, kLoaderRegisters = 24;
  using Own = Panels<D, kRows>;
  using Streamed = Panels<D, kStreamed>;
  using Pipeline = LoadPipeline<kSlots, kGroups * 4>;

  // Shared memory, from a multiple of 1024 bytes on.
  struct Memory {
    uint8_t own[2][Own::kBytes];
    uint8_t slots[kSlots][Streamed::kBytes];
    float2 statistics[kSlots][kStreamed];
    typename Pipeline::Barriers barriers;
  };
  static constexpr int kBytes = AlignedMemory::kBytes + static_cast<int>(sizeof(Memory));
  static_assert(kBytes <= 227 * 1024);
};

// The addresses in a Memory that begins at `begin`.
template <class Shape>
struct BackwardMemory {
  using Memory = typename Shape::Memory;
  uint32_t own[2], slots, statistics;
  typename Shape::Pipeline pipeline;

  __device__ __forceinline__ BackwardMemory(uint32_t begin) {
    own[0] = begin;
    own[1] = begin + static_cast<uint32_t>(sizeof(Memory::own[0]));
    slots = begin + static_cast<uint32_t>(offsetof(Memory, slots));
    statistics = begin + static_cast<uint32_t>(offsetof(Memory, statistics));
    pipeline.barriers = begin + static_cast<uint32_t>(offsetof(Memory, barriers));
  }
  __device__ __forceinline__ uint32_t item(int slot) const {
    return slots + static_cast<uint32_t>(slot * static_cast<int>(sizeof(Memory::slots[0])));
  }
  __device__ __forceinline__ uint32_t statistics_of(int slot) const {
    return statistics + static_cast<uint32_t>(slot * static_cast<int>(sizeof(Memory::statistics[0])));
  }
};

// acc = own rows @ streamed rows^T, for a warpgroup whose own rows begin at `row`. Both operands come from shared
// memory: ptxas overwrites a left operand that stays in registers for the whole loop (measured.md).
template <class T, int D, class Shape, int NT>
__device__ __forceinline__ void begin_own_rows(float (&acc)[1][NT][4], const BackwardMemory<Shape>& memory, int which,
                                               int row, uint32_t streamed) {
  ptx::wgmma_fence();
  begin_rows<T, D, Shape::kRows>(acc, memory.own[which], row, streamed);
  ptx::wgmma_commit();
}

}  // namespace torchweld::cuda::attention::sm90
