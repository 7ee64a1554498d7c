// Where the words of an operand of tiles lie in memory.
//
// An operand is a sequence of strips, a strip is a sequence of blocks along k, and a block is what a tile register
// holds: 16 rows of 16 words. Elements that are a sum of parts (2 for float16, 3 for float32) have a block for each
// part; the blocks of one range of k lie side by side. A word is a pair of bf16 that are neighbours along k.
//
//   a strip, 2 parts:        | k 0..15, part 0 | k 0..15, part 1 | k 16..31, part 0 | k 16..31, part 1 | ...
//   offset of a block:       0                 256               512                768                1024
//
//   Left operand A[m, k]: a strip is 16 rows,               Right operand B[k, n]: a strip is 16 columns,
//   16 * `row` words from one to the next.                  `panel` words from one to the next.
//
//        k ->                                                    n ->
//      m +----------------+----------------+                   k +---------+---------+
//      | | rows 0..15     block, block, ...|                   | | columns | columns |
//      v +----------------+----------------+                   v |  0..15  |  16..31 |
//        | rows 16..31    block, block, ...|                     |  block  |  block  |
//        +----------------+----------------+                     |  block  |  block  |
//                                                                |   ...   |   ...   |
//      in a block: [m % 16][k % 16]                            in a block: [k % 16][n % 16]
//
// A step is a word of one part. Steps count the words of all parts: `row`, the steps of a row of A, is kParts times the
// words of an element's row, up to whole blocks. Whole blocks can be read; what is past the operand is zero, or counts
// in nothing that is stored.
#pragma once

#include <cstdint>

namespace torchweld::cpu {
namespace {

template <int kParts>
struct TileLayout {
  static constexpr int64_t side = 16;               // rows of a block, and words of each
  static constexpr int64_t block = side * side;     // words
  static constexpr int64_t range = block * kParts;  // from one block to the next one of the same part

  // Where the strip of row or column n begins, n a multiple of side; `words`: of a strip.
  static constexpr int64_t strip(int64_t n, int64_t words) { return n / side * words; }
  // In a strip, where the block of first parts with word k begins.
  static constexpr int64_t block_of(int64_t k) { return k / side * range; }
  // In a strip, where step `step` begins, a multiple of side.
  static constexpr int64_t at_step(int64_t step) { return step * side; }

  // Word k of row m of a left operand with rows of `row` steps, first part; part n lies n * block further on.
  static constexpr int64_t left(int64_t m, int64_t k, int64_t row) {
    return strip(m, side * row) + block_of(k) + m % side * side + k % side;
  }
  // Word k of column n of a right operand.
  static constexpr int64_t right(int64_t k, int64_t n, int64_t panel) {
    return strip(n, panel) + block_of(k) + k % side * side + n % side;
  }
  // Element i of a row of a left operand, counted in bf16 from the row's first word.
  static constexpr int64_t element(int64_t i) { return i / (2 * side) * (2 * range) + i % (2 * side); }
};

}  // namespace
}  // namespace torchweld::cpu
