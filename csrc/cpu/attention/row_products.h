// Products of a few rows with keys that are read where they lie: for so few, packing keys costs more than it saves.
#pragma once

#include "cpu/matmul/matmul.h"
#include "cpu/matmul/pack.h"

namespace torchweld::cpu {
namespace {

// Words [d, d + W) of a row of `dim` elements.
template <class T, class Compute>
TW_INLINE Vec words_at(const T* row, int64_t d, int64_t dim) {
  Vec v[1];
  load_words<T, Compute>(row, d, dim, v);
  return v[0];
}

// Of R rows, `steps` words each, with keys [keys.begin, keys.end) of `dim` elements: s[r * s_stride + j]. From the last
// key up to a whole vector there are zeros.
template <class T, class Compute, int R>
TW_INLINE void row_products(const T* k, int64_t stride, int64_t dim, Span keys, const float* rows, int64_t steps,
                            float* s, int64_t s_stride) {
  for (int64_t j = keys.begin; j < keys.end; j += W) {
    Vec product[R][W];
    for (int n = 0; n < W; ++n) {
      Vec acc[R] = {};
      for (int64_t d = 0; d < steps && j + n < keys.end; d += W) {
        const Vec key = words_at<T, Compute>(k + (j + n) * stride, d, dim);
        for (int r = 0; r < R; ++r) acc[r] = Compute::dot(key, load(rows + r * steps + d), acc[r]);
      }
      for (int r = 0; r < R; ++r) product[r][n] = acc[r];
    }
    for (int r = 0; r < R; ++r) store(s + r * s_stride + j, reduce(product[r], [](Vec a, Vec b) { return a + b; }));
  }
}

// Keys or values of a tile, to be multiplied with rows: packed, or read where they lie where the call has a few rows.
template <class T, class Compute>
class TileOperand {
 public:
  static int64_t words(int64_t tile_keys, int64_t dim) { return tile_keys * words_of<Compute>(dim); }

  // `seen` rows from `data` on; the tile reads past them, where zeros stand for them. memory: words(...) floats.
  void load(const T* data, int64_t stride, int64_t seen, int64_t dim, int64_t queries, float* memory) {
    data_ = data;
    stride_ = stride;
    dim_ = dim;
    packed_ = {memory, Compute::panel, Compute::panel * words_of<Compute>(dim)};
    few_ = Compute::per_word == 1 && queries <= 2 && dim % W == 0;
    if (!few_) pack_transposed<T, Compute>(data, stride, seen, dim, memory);
  }

  // Rows times the columns of the operand that each block of them sees, [seen.begin, seen.end) in all.
  TW_INLINE void multiply(int64_t count, const Left& rows, const Span* columns, Span seen, float* out,
                          int64_t stride) const {
    if constexpr (Compute::per_word == 1) {
      if (few_) {
        for (int64_t r = 0; r < count; ++r)
          row_products<T, Compute, 1>(data_, stride_, dim_, {round_down(seen.begin, W), seen.end},
                                      rows.data + r * rows.row, dim_, out + r * stride, stride);
        return;
      }
    }
    gemm_store<Compute>(count, words_of<Compute>(dim_), rows, packed_, columns, out, stride);
  }

 private:
  const T* data_ = nullptr;
  int64_t stride_ = 0, dim_ = 0;
  Right packed_{};
  bool few_ = false;
};

}  // namespace
}  // namespace torchweld::cpu
