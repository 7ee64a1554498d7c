// Which tile of which head a block works on. Heads are grouped into sections whose keys and values fit the L2 cache
// together. Within a section the longest tiles of all heads come first: with a causal mask these are the last tiles of
// queries, or the first tiles of keys.
#pragma once

#include <initializer_list>

#include "cuda/common.cuh"

namespace torchweld::cuda::attention {

class Schedule {
 public:
  struct Work {
    int64_t head;  // b * heads + h
    int tile;
  };

  Schedule() = default;

  // `heads` heads of `rows` rows, in tiles of `tile` rows. Each group of `shared` consecutive heads reads the same
  // `bytes` bytes.
  Schedule(int64_t heads, int64_t rows, int64_t tile, int64_t shared, int64_t bytes, bool first_longest)
      : heads_(heads), tiles_(static_cast<int>((rows + tile - 1) / tile)), first_longest_(first_longest) {
    constexpr int64_t kCache = 16 << 20;
    const int64_t fitting = kCache / (bytes > 0 ? bytes : 1);
    section_ = (fitting > 0 ? fitting : 1) * shared;
    if (section_ > heads) section_ = heads;
    if (section_ < 1) section_ = 1;
    if (heads * tiles_ > INT32_MAX)
      throw std::invalid_argument("[attention] query: expected at most 2^31 - 1 tiles of all heads, but got " +
                                  std::to_string(heads * tiles_) + "; split the batch");
  }

  bool empty() const { return heads_ * tiles_ == 0; }
  dim3 grid() const { return dim3(static_cast<unsigned>(heads_ * tiles_)); }

  __device__ __forceinline__ Work work(int64_t block) const {
    const int64_t first = block / (section_ * tiles_) * section_,
                  here = heads_ - first < section_ ? heads_ - first : section_;
    const int64_t rest = block - first * tiles_;
    const int tile = static_cast<int>(rest / here);
    return {first + rest % here, first_longest_ ? tile : tiles_ - 1 - tile};
  }

 private:
  int64_t heads_ = 0, section_ = 0;
  int tiles_ = 0;
  bool first_longest_ = false;
};

// True if every row begins on a multiple of `bytes`. A missing tensor (nullptr) passes.
inline bool rows_aligned(int64_t bytes, size_t element, std::initializer_list<const void*> bases,
                         std::initializer_list<Strides> strides) {
  for (const void* base : bases)
    if (reinterpret_cast<uintptr_t>(base) % bytes != 0) return false;
  for (const Strides& s : strides)
    if ((s.batch | s.head | s.row) * static_cast<int64_t>(element) % bytes != 0) return false;
  return true;
}

}  // namespace torchweld::cuda::attention
