// The load pipeline of a block on Hopper: warpgroup 0 copies tiles into slots of shared memory, the other warpgroups
// multiply them.
//
// The copies use cp.async, not tensor maps. Rows may have any stride and alignment, and a kernel reads only the rows
// that its queries see. So packed sequences, broadcast heads and views need no kernel of their own. A copy costs three
// instructions per lane and 16 bytes.
#pragma once

#include "cuda/attention/sm90/tile.cuh"

namespace torchweld::cuda::attention::sm90 {

// The named barriers of a block. Barrier 0 is __syncthreads().
enum class ForwardBarrier : int { first_turn = 1 };  // warpgroup g waits for its turn at first_turn + g
enum class BackwardBarrier : int { consumers = 1 };  // all warpgroups that multiply

// Where an item is in a ring of kSlots slots: its slot, and the parity of the rounds before it.
template <int kSlots>
struct RingPlace {
  int slot = 0;
  uint32_t round = 0;

  static __device__ __forceinline__ RingPlace of(int item) {
    return {item % kSlots, static_cast<uint32_t>(item / kSlots % 2)};
  }
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, round ^= 1;
  }
};

// The places of items 2n and 2n + 1.
template <int kSlots>
struct RingPair {
  RingPlace<kSlots> first;

  __device__ __forceinline__ RingPlace<kSlots> second() const {
    if constexpr (kSlots % 2 == 0) return {first.slot + 1, first.round};  // no pair crosses the end
    RingPlace<kSlots> place = first;
    place.next();
    return place;
  }
  __device__ __forceinline__ void next() {
    first = second();
    first.next();
  }
};

// Slots of shared memory, filled by warpgroup 0 (the producer) and read by kConsumerWarps warps. Item n is in slot
// n % kSlots. Each slot has two mbarriers: `full` completes when the item has arrived, `empty` when all consumers have
// released it.
template <int kSlots, int kConsumerWarps>
struct LoadPipeline {
  using Place = RingPlace<kSlots>;
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
        ptx::mbarrier_init(full(slot), kWarpgroup / kWarpSize);
        ptx::mbarrier_init(empty(slot), kConsumerWarps);
      }
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

  // Loads one item after another. Copies that the producer started before item 0 arrive with it.
  class Producer {
   public:
    __device__ __forceinline__ explicit Producer(const LoadPipeline& pipeline) : pipeline_(pipeline) {}

    // copy(slot) starts the cp.async copies of the next item.
    template <class Copy>
    __device__ __forceinline__ void load(Copy&& copy) {
      // In the first round this finds the phase before the first, which is over.
      const uint32_t empty = pipeline_.empty(place_.slot), parity = place_.round ^ 1;
      if (!ptx::mbarrier_try_wait(empty, parity)) {
        finish();  // the consumers may need every loaded item before they release a slot
        ptx::mbarrier_wait(empty, parity);
      }
      copy(place_.slot);
      ptx::cp_async_commit();
      announce<1>();
      newest_ = pipeline_.full(place_.slot);
      place_.next();
    }
    __device__ __forceinline__ void finish() {
      announce<0>();
      newest_ = 0;
    }

   private:
    // Waits until all but the last kPending groups of copies have arrived, and announces the newest item.
    template <int kPending>
    __device__ __forceinline__ void announce() {
      if (newest_ == 0) return;
      ptx::cp_async_wait<kPending>();
      ptx::fence_proxy_async();  // wgmma reads the item
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(newest_);
    }

    Place place_;
    uint32_t newest_ = 0;  // `full` of the newest item until it is announced, else 0
    const LoadPipeline& pipeline_;
  };

  // A consumer waits until the item has arrived. The wait is a branch, and ptxas moves a wait for wgmma up to the last
  // branch before it: work that should overlap with a product needs a wait() after the work.
  __device__ __forceinline__ void wait(Place item) const { ptx::mbarrier_wait(full(item.slot), item.round); }
  // A consumer warp no longer reads the item.
  __device__ __forceinline__ void release(Place item) const {
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(empty(item.slot));
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

// The tiles of R rows of one tensor, one after another. Each thread of the producer keeps its place in the rows, so
// that no tile costs it a product or a division.
template <class T, int D, int R>
class TileStream {
 public:
  // The first tile begins at row `first`.
  __device__ __forceinline__ TileStream(const Rows<T>& rows, int first) : rows_(rows) {
    const Share own(ptx::opaque(threadIdx.x));
    walk_ = {rows.base + (first + own.row) * rows.stride + own.column(), Share::kRowsAtOnce * rows.stride};
    place_ = ptx::opaque(own.template place<Layout>(0));  // one register, not its parts
  }

  // Starts the copies of the next tile, whose first row is `first`.
  __device__ __forceinline__ void load(uint32_t tile, int first) {
    const int last_whole = rows_.vectorized && rows_.size == D ? rows_.end - R : rows_.begin - 1;
    if (first >= rows_.begin && first <= last_whole) {
      const uint32_t to = tile + place_;
#pragma unroll
      for (int r = 0; r < R; r += Share::kRowsAtOnce) {
        ptx::cp_async(Layout::below(to, r), walk_.here());
        walk_.next();
        walk_.row = ptx::opaque(walk_.row);  // one sum per chunk: multiples of `ahead` would take registers
      }
    } else {
      load_partial_tile<T, Layout>(tile, rows_, first, walk_, 0, Share(ptx::opaque(threadIdx.x)));
    }
  }

 private:
  using Layout = Panels<D, R>;
  using Share = TileShare<T, D, R, kWarpgroup>;
  static_assert(R % Share::kRowsAtOnce == 0);
  Rows<T> rows_;
  typename Rows<T>::Walk walk_;  // its `row` is this thread's first chunk of the next tile
  uint32_t place_;               // of that chunk in a tile
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
