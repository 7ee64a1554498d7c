// Attention, backward, on Hopper: what keys and queries (see attention/backward.cuh) share where wgmma makes their
// products.
//
// Own rows, 64 to a warpgroup, stay in shared memory; tiles of the others go through slots that one more warpgroup
// fills. Scores and dP of a tile are on their way together, and weights are made beside dP; what else stands still in
// one warpgroup is the other's time at the tensor cores.
#pragma once

#include "cuda/attention/backward.cuh"
#include "cuda/attention/sm90/ring.cuh"

namespace torchweld::cuda {

// Item 2n is tile n of the streamed rows that scores are made of, item 2n + 1 that of those of dP; each with two
// floats for every row, `softmax` or `gradient`.
template <int D, int kOthers_>
struct BackwardShapeSm90 {
  static constexpr int kGroups = 2, kThreads = (1 + kGroups) * kWarpgroup, kRows = kGroups * 64, kOthers = kOthers_;
  static constexpr int kSlots = D <= 128 ? (kOthers_ <= 64 ? 6 : 4) : 3;
  static constexpr int kRegisters = 240, kLoaderRegisters = 24;
  using Own = Panels<D, kRows>;
  using Others = Panels<D, kOthers>;
  using Ring = Slots<kSlots, kGroups * 4>;
  static constexpr int kValueBytes = kOthers * static_cast<int>(sizeof(float2));
  static constexpr int kBytes =
      AlignedMemory::kBytes + 2 * Own::kBytes + kSlots * (Others::kBytes + kValueBytes) + Ring::kBarrierBytes;
  static_assert(kBytes <= 227 * 1024);
};

// Shared memory: two tiles of own rows, the slots, and the floats of each.
template <class Shape>
struct BackwardMemorySm90 {
  uint32_t own[2], slots, values;
  typename Shape::Ring ring;

  __device__ __forceinline__ BackwardMemorySm90(uint32_t begin) {
    own[0] = begin;
    own[1] = own[0] + Shape::Own::kBytes;
    slots = own[1] + Shape::Own::kBytes;
    values = slots + Shape::kSlots * Shape::Others::kBytes;
    ring.barriers = values + Shape::kSlots * Shape::kValueBytes;
  }
  __device__ __forceinline__ uint32_t item(int n) const {
    return slots + static_cast<uint32_t>(n % Shape::kSlots * Shape::Others::kBytes);
  }
  __device__ __forceinline__ uint32_t values_of(int n) const {
    return values + static_cast<uint32_t>(n % Shape::kSlots * Shape::kValueBytes);
  }
};

// acc = own rows @ other rows^T, of a warpgroup whose own rows begin at `row`. Both operands are read from shared
// memory: ptxas overwrites a left operand that stays in registers for the whole loop (attention_sm90.md).
template <class T, int D, class Shape, int NT>
__device__ __forceinline__ void begin_own_rows(float (&acc)[1][NT][4], const BackwardMemorySm90<Shape>& memory,
                                               int which, int row, uint32_t others) {
  ptx::wgmma_fence();
  begin_rows<T, D, Shape::kRows>(acc, memory.own[which], row, others);
  ptx::wgmma_commit();
}

}  // namespace torchweld::cuda
