// The load pipeline of a block on Hopper: warpgroup 0 copies tiles into slots of shared memory, the other warpgroups
// multiply them.
//
// The copies use cp.async, not tensor maps. Rows may have any stride and alignment, and a kernel reads only the rows
// that its queries see. So packed sequences, broadcast heads and views need no kernel of their own. A copy costs about
// three instructions per lane and 16 bytes.
#pragma once

#include "cuda/attention/sm90/tile.cuh"

namespace torchweld::cuda::attention::sm90 {

// The named barriers of a block. Barrier 0 is __syncthreads().
enum class ForwardBarrier : int { first_turn = 1 };  // warpgroup g waits for its turn at first_turn + g
enum class BackwardBarrier : int { consumers = 1 };  // all warpgroups that multiply

// kSlots slots of shared memory, filled by warpgroup 0 (the producer) and read by kConsumerWarps warps. Item n is in
// slot n % kSlots. Each slot has two mbarriers: `full` completes when the item has arrived, `empty` when all consumers
// have released it.
template <int kSlots, int kConsumerWarps>
struct LoadPipeline {
  struct Barriers {
    struct Slot {
      uint64_t full, empty;
    } slots[kSlots];
  };
  uint32_t barriers;  // address of the Barriers

  // All threads of the block call this once.
  __device__ __forceinline__ void init() const {
    if (threadIdx.x == 0) {
      for (int slot = 0; slot < kSlots; ++slot) {
        ptx::mbarrier_init(full(slot), kWarpgroup);
        ptx::mbarrier_init(empty(slot), kConsumerWarps);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  // The producer calls this: copy(item) starts the cp.async copies of an item. Copies that the producer started earlier
  // arrive with item 0.
  template <class Copy>
  __device__ __forceinline__ void fill(int items, Copy&& copy) const {
    Producer producer{*this};
#pragma unroll 1
    while (producer.items < items) producer.load(copy);
    producer.finish();
  }

  // The same, one item at a time.
  struct Producer {
    const LoadPipeline& pipeline;
    int items = 0, announced = 0;

    template <class Copy>
    __device__ __forceinline__ void load(Copy&& copy) {
      const uint32_t slot = pipeline.empty(items % kSlots), parity = (items / kSlots - 1) % 2;
      if (items >= kSlots && !ptx::mbarrier_try_wait(slot, parity)) {
        finish();  // the consumers may need every loaded item before they release a slot
        ptx::mbarrier_wait(slot, parity);
      }
      copy(items);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      announce();
      ++items;
    }
    __device__ __forceinline__ void finish() {
      ptx::cp_async_wait<0>();
      announce();
    }

   private:
    // Announces every item before the newest.
    __device__ __forceinline__ void announce() {
      if (announced == items) return;
      ptx::fence_proxy_async();  // wgmma reads the items
      for (; announced < items; ++announced) ptx::mbarrier_arrive(pipeline.full(announced % kSlots));
    }
  };

  // A consumer waits until the item has arrived. The wait is a branch, and ptxas moves a wait for wgmma up to the last
  // branch before it: work that should overlap with a product needs a wait() after the work.
  __device__ __forceinline__ void wait(int item) const { ptx::mbarrier_wait(full(item % kSlots), item / kSlots % 2); }
  // A consumer warp no longer reads the item.
  __device__ __forceinline__ void release(int item) const {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(empty(item % kSlots));
  }

 private:
  using Slot = typename Barriers::Slot;
  __device__ __forceinline__ uint32_t full(int slot) const {
    return barriers + static_cast<int>(sizeof(Slot)) * slot + static_cast<int>(offsetof(Slot, full));
  }
  __device__ __forceinline__ uint32_t empty(int slot) const {
    return barriers + static_cast<int>(sizeof(Slot)) * slot + static_cast<int>(offsetof(Slot, empty));
  }
};

// Waits for the kGroups warpgroups that multiply.
template <int kGroups>
__device__ __forceinline__ void sync_consumers() {
  ptx::barrier_sync(static_cast<int>(BackwardBarrier::consumers), kGroups * kWarpgroup);
}

// The ping-pong schedule of the forward: one warpgroup issues products while the others compute softmax. Warpgroups 1
// to kGroups take turns.
template <int kGroups>
struct PingPong {
  int group;  // 0 to kGroups - 1

  __device__ __forceinline__ void start() const {
    if (group == kGroups - 1) pass();
  }
  __device__ __forceinline__ void wait_turn() const { ptx::barrier_sync(turn_of(group), 2 * kWarpgroup); }
  __device__ __forceinline__ void pass() const { ptx::barrier_arrive(turn_of((group + 1) % kGroups), 2 * kWarpgroup); }
  // After its last turn: no warpgroup waits for the first turn again.
  __device__ __forceinline__ void finish() const {
    if (group != kGroups - 1) pass();
  }

 private:
  static __device__ __forceinline__ int turn_of(int group) {
    return static_cast<int>(ForwardBarrier::first_turn) + group;
  }
};

// The block's shared memory from its first multiple of 1024 bytes on: a kernel asks for kBytes more than it uses.
struct AlignedMemory {
  static constexpr int kBytes = 1024;
  static __device__ __forceinline__ uint32_t begin() { return (ptx::shared_base() + kBytes - 1) / kBytes * kBytes; }
};

}  // namespace torchweld::cuda::attention::sm90
