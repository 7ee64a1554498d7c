// How tiles get to Hopper's tensor cores: one warpgroup of a block fills slots, the others multiply.
//
// It loads by cp.async, not by tensor maps: rows may lie and end anywhere, and are taken only as far as they are seen,
// so that packed sequences, broadcast heads and views need no other kernel. That costs it about three instructions for
// 16 bytes of every lane.
#pragma once

#include "cuda/attention/sm90/tile.cuh"

namespace torchweld::cuda {

// Slots of shared memory that go from the warpgroup that fills them to `kReaders` warps and back: item n is in slot
// n % kSlots. Of two barriers per slot, one is passed when it is full, one when it is empty.
template <int kSlots, int kReaders>
struct Slots {
  static constexpr int kBarrierBytes = 16 * kSlots;
  uint32_t barriers;

  // By all threads.
  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kSlots; ++slot) {
        ptx::mbarrier_init(full(slot), kWarpgroup);
        ptx::mbarrier_init(empty(slot), kReaders);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  // By the warpgroup that fills: load(item) begins copies by cp.async. What it has begun before is there with item 0.
  template <class Load>
  __device__ __forceinline__ void fill(int items, Load&& load) const {
    Filling filling{*this};
#pragma unroll 1
    while (filling.items < items) filling.add(load);
    filling.end();
  }

  // The same, one by one.
  struct Filling {
    const Slots& slots;
    int items = 0, announced = 0;

    template <class Load>
    __device__ __forceinline__ void add(Load&& load) {
      const uint32_t slot = slots.empty(items % kSlots), parity = (items / kSlots - 1) % 2;
      if (items >= kSlots && !ptx::mbarrier_try_wait(slot, parity)) {
        end();  // readers may want all that there is before they leave a slot
        ptx::mbarrier_wait(slot, parity);
      }
      load(items);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      announce();
      ++items;
    }
    __device__ __forceinline__ void end() {
      ptx::cp_async_wait<0>();
      announce();
    }

   private:
    // All items before the newest.
    __device__ __forceinline__ void announce() {
      if (announced == items) return;
      ptx::fence_proxy_async();  // wgmma reads them
      for (; announced < items; ++announced) ptx::mbarrier_arrive(slots.full(announced % kSlots));
    }
  };

  // By the readers, of each item: it is there; this warp no longer needs it. Awaiting is a branch, and the assembler
  // moves a wait for products up to the last branch before it: what is to be done beside the products needs one after
  // it.
  __device__ __forceinline__ void await(int item) const { ptx::mbarrier_wait(full(item % kSlots), item / kSlots % 2); }
  __device__ __forceinline__ void release(int item) const {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(empty(item % kSlots));
  }

 private:
  __device__ __forceinline__ uint32_t full(int slot) const { return barriers + 16 * slot; }
  __device__ __forceinline__ uint32_t empty(int slot) const { return barriers + 16 * slot + 8; }
};

// Warpgroups take turns at the tensor cores: while one multiplies, the others make weights. Warpgroups 1 to kGroups.
template <int kGroups>
struct Turns {
  int group;  // of these: 0 to kGroups - 1

  __device__ __forceinline__ void begin() const {
    if (group == kGroups - 1) pass();
  }
  __device__ __forceinline__ void take() const { ptx::barrier_sync(1 + group, 2 * kWarpgroup); }
  __device__ __forceinline__ void pass() const { ptx::barrier_arrive(1 + (group + 1) % kGroups, 2 * kWarpgroup); }
  // After the last turn nobody waits for the first.
  __device__ __forceinline__ void end() const {
    if (group != kGroups - 1) pass();
  }
};

// The first place on 1024 bytes of the block's shared memory; kBytes more have to be asked for.
struct AlignedMemory {
  static constexpr int kBytes = 1024;
  static __device__ __forceinline__ uint32_t begin() { return (ptx::shared_base() + kBytes - 1) / kBytes * kBytes; }
};

}  // namespace torchweld::cuda
