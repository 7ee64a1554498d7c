// P and dscores of one tile of the attention backward, in the forms in which the products of the gradients read them.
//
//   dvalue, dkey   sum over queries: P and dscores with words along the queries. The vector units read them by columns
//                  as left operands; tiles read left operands by rows alone, so there they are right operands.
//   dquery         sums over keys: dscores with words along the keys, a left operand. Where a word is a single element
//                  this is the first form of dscores, read by rows.
#pragma once

#include "cpu/matmul/pack.h"

namespace torchweld::cpu {
namespace {

template <class Compute>
class GradientOperands {
  static constexpr bool kPairs = Compute::per_word == 2;

 public:
  static constexpr int64_t kQueries = Compute::per_word / Compute::parts == 2 ? 192 : 96;

  struct Score {
    Vec probability, gradient;
  };

  // Words of a row of scores of a tile of so many keys. No power of two: rows would share cache sets.
  static int64_t stride_of(int64_t tile_keys) { return tile_keys + 32; }
  static int64_t words(int64_t tile_keys) {
    return (kPairs ? 3 : 4) * kQueries * stride_of(tile_keys) / 2 * Compute::parts;
  }

  GradientOperands(int64_t tile_keys, float* memory)
      : probability(memory),
        dscore(memory + words_of<Compute>(kQueries) * stride_of(tile_keys)),
        dscore_rows_(kPairs ? dscore + words_of<Compute>(kQueries) * stride_of(tile_keys) : dscore),
        stride_(stride_of(tile_keys)) {}

  // Row t of the tile, and its neighbour where words are pairs, columns [j, j + W).
  TW_INLINE void write(int64_t t, int64_t j, const Score (&score)[Compute::per_word]) {
    if constexpr (kPairs) {
      int64_t at = t / 2 * stride_ + j;
      if constexpr (Compute::tiles) at = Compute::Layout::right(t / 2, 0, kStrip) + Compute::Layout::strip(j, kStrip);
      store_pairs(probability + at, score[0].probability, score[1].probability);
      store_pairs(dscore + at, score[0].gradient, score[1].gradient);
      for (int n = 0; n < 2; ++n)
        Compute::store_row(Compute::row_of(dscore_rows_, words_of<Compute>(stride_), t + n), j, score[n].gradient);
    } else {
      store(probability + t * stride_ + j, score[0].probability);
      store(dscore + t * stride_ + j, score[0].gradient);
    }
  }

  // `probability` or `dscore` as an operand that is summed over the queries: from key r on with tiles, else of all
  // keys.
  Right right_by_query(const float* data, int64_t r) const {
    return {data + Compute::Layout::strip(r, kStrip), Compute::Layout::side, kStrip};
  }
  Left left_by_query(const float* data) const { return {data, 1, stride_}; }

  // dscores as an operand that is summed over the keys.
  Left by_key() const { return {dscore_rows_, words_of<Compute>(stride_), 1}; }

  float *const probability, *const dscore;  // [words_of(kQueries), stride] words along the queries

 private:
  // Words of 16 keys: of a strip of the right operand of tiles.
  static constexpr int64_t kStrip = kQueries / 2 * Compute::parts * 16;

  TW_INLINE static void store_pairs(float* to, Vec even, Vec odd) {
    VecU part[2][Compute::parts];
    split(even, part[0]);
    split(odd, part[1]);
    for (int n = 0; n < Compute::parts; ++n) store(to + n * TileLayout<1>::block, pairs(part[0][n], part[1][n]));
  }

  float* const dscore_rows_;  // [kQueries, words_of(stride)] words along the keys
  const int64_t stride_;
};

}  // namespace
}  // namespace torchweld::cpu
