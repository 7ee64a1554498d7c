// Tiles of keys and values on their way through shared memory: by turns into a ring of slots, by cp.async, so that the
// next ones land while one is multiplied.
#pragma once

#include "cuda/attention/scores.cuh"

namespace torchweld::cuda {

// Item 2n is tile n of the keys, of kKeys rows from `start` on; item 2n + 1 is its values.
template <class T, int D, int kKeys, int kSlots, int kThreads, class Source>
struct Ring {
  static constexpr int kSlotBytes = kKeys * Tile<T, D>::kRowBytes;
  uint32_t slots;
  const Source &key, &value;
  int start, steps;

  // Until item `advance` is asked for; what else this thread copies before is there with the first.
  __device__ __forceinline__ void fill() const {
#pragma unroll
    for (int item = 0; item < kSlots - 1; ++item) load(item);
  }

  // Where the item is: it is there for all, and all are done with the one before it, whose slot is filled anew.
  __device__ __forceinline__ uint32_t advance(int item) const {
    ptx::cp_async_wait<kSlots - 2>();
    __syncthreads();
    load(item + kSlots - 1);
    return slot(item);
  }

 private:
  __device__ __forceinline__ uint32_t slot(int item) const {
    return slots + static_cast<uint32_t>(item % kSlots * kSlotBytes);
  }
  __device__ __forceinline__ void load(int item) const {
    if (item < 2 * steps)
      load_tile<T, D, kKeys, kThreads>(slot(item), item % 2 == 0 ? key : value, start + item / 2 * kKeys);
    ptx::cp_async_commit();
  }
};

}  // namespace torchweld::cuda
