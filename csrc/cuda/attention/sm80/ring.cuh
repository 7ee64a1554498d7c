// A ring of shared-memory slots for the tiles of keys and values: cp.async fills the next slots while the block
// multiplies one.
#pragma once

#include "cuda/attention/scores.cuh"

namespace torchweld::cuda::attention::sm80 {

// Item 2n is tile n of the keys (kKeys rows, tile 0 begins at row `start`), item 2n + 1 the same tile of the values.
template <class T, int D, int kKeys, int kSlots, int kThreads, class Source>
struct Ring {
  using Slots = uint8_t[kSlots][kKeys * Tile<T, D>::kRowBytes];
  uint32_t slots;  // address of the Slots
  const Source &key, &value;
  int start, steps;

  // Starts the first copies. Copies that this thread started earlier arrive with item 0.
  __device__ __forceinline__ void fill() const {
#pragma unroll
    for (int item = 0; item < kSlots - 1; ++item) load(item);
  }

  // The address of the item. All threads see the item, and all have finished the item before it, whose slot is
  // refilled.
  __device__ __forceinline__ uint32_t advance(int item) const {
    ptx::cp_async_wait<kSlots - 2>();
    __syncthreads();
    load(item + kSlots - 1);
    return slot(item);
  }

 private:
  __device__ __forceinline__ uint32_t slot(int item) const {
    return slots + static_cast<uint32_t>(item % kSlots * static_cast<int>(sizeof(Slots) / kSlots));
  }
  __device__ __forceinline__ void load(int item) const {
    if (item < 2 * steps)
      load_tile<T, D, kKeys, kThreads>(slot(item), item % 2 == 0 ? key : value, start + item / 2 * kKeys);
    ptx::cp_async_commit();
  }
};

}  // namespace torchweld::cuda::attention::sm80
