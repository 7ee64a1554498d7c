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

// Item 2n is tile n of the streamed rows that scores are made of, item 2n + 1 that of those of dP; each with a float
// for every row.
template <int D, int kOthers_>
struct BackwardShapeSm90 {
  static constexpr int kGroups = 2, kThreads = (1 + kGroups) * kWarpgroup, kRows = kGroups * 64, kOthers = kOthers_;
  static constexpr int kSlots = D <= 128 ? (kOthers_ <= 64 ? 6 : 4) : 3;
  static constexpr int kRegisters = 240, kLoaderRegisters = 24;
  static constexpr bool kOwnInRegisters = D <= 64;  // wgmma reads less of shared memory then
  using Own = Panels<D, kRows>;
  using Others = Panels<D, kOthers>;
  using Ring = Slots<kSlots, kGroups * 4>;
  static constexpr int kValueBytes = kOthers * static_cast<int>(sizeof(float));
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

// The left operands of scores and dP, a warpgroup's own rows: where they are, or in registers.
template <class T, int D, class Shape>
class OwnRows {
 public:
  // Once they are there.
  __device__ __forceinline__ OwnRows(const BackwardMemorySm90<Shape>& memory, int row) : memory_(memory), row_(row) {
    if constexpr (Shape::kOwnInRegisters) {
      const int own = lane();
#pragma unroll
      for (int which = 0; which < 2; ++which)
#pragma unroll
        for (int step = 0; step < D / 16; ++step)
          ptx::ldmatrix(lefts_[which].words[step],
                        memory.own[which] + Shape::Own::at(row + warp() % 4 * 16 + own % 16, 2 * step + own / 16));
    }
  }

  // acc = own rows @ other rows^T.
  template <int NT>
  __device__ __forceinline__ void begin(float (&acc)[1][NT][4], int which, uint32_t others) const {
    ptx::wgmma_fence();
    if constexpr (Shape::kOwnInRegisters)
      begin_rows<T, D>(acc, lefts_[which], others);
    else
      begin_rows<T, D, Shape::kRows>(acc, memory_.own[which], row_, others);
    ptx::wgmma_commit();
  }

 private:
  struct Nothing {};
  const BackwardMemorySm90<Shape>& memory_;
  int row_;
  std::conditional_t<Shape::kOwnInRegisters, Lefts<D / 8>, Nothing> lefts_[2];
};

}  // namespace torchweld::cuda
