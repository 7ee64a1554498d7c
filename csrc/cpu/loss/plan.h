// How linear_cross_entropy cuts its work, and what memory that takes.
#pragma once

#include "cpu/loss/classes.h"
#include "cpu/loss/weight_sum.h"
#include "cpu/parallel.h"
#include "params/loss.h"

namespace torchweld::cpu {
namespace {

// Rows of a chunk, at most; a multiple of every block_rows but 6. More cost memory, fewer time: weight and its gradient
// move once for each chunk. In 16 bits all else is small beside a chunk.
template <class T>
constexpr int64_t kChunkRows = sizeof(T) == 2 ? 320 : 512;
constexpr int64_t kParts = 16;         // of dinput, at most
constexpr int64_t kTileRows = 64;      // of logits, or of dweight, at once
constexpr int64_t kMostClasses = 256;  // of a block
constexpr int64_t kSpans = ceil_div(kChunkRows<float>, kRows);

// Everything that sizes decide, threads aside. Lengths are in words of 32 bits and whole cache lines.
template <class T, class S, class Compute>
struct Plan {
  int64_t chunk, width;                           // rows of a chunk; classes of a block
  int64_t blocks, parts;                          // of the classes; of dinput
  int64_t columns;                                // features up to whole vectors
  int64_t row_steps, feature_steps, class_steps;  // where rows, features or the classes of a block are summed over
  bool gradient, sums;                            // whether any is wanted; whether dweight is a sum over chunks

  explicit Plan(const LinearCrossEntropyParams& p) {
    chunk = min_of(kChunkRows<T>, round_up(max_of(p.rows, 1), 32));
    width = min_of(kMostClasses, round_up(max_of(ceil_div(p.classes, 2 * kParts), 1), 64));
    blocks = ceil_div(p.classes, width);
    gradient = p.dloss != nullptr;
    parts = p.dinput != nullptr ? min_of(blocks, kParts) : 0;
    columns = round_up(p.features, W);
    row_steps = words_of<Compute>(chunk);
    feature_steps = words_of<Compute>(p.features);
    class_steps = words_of<Compute>(width);
    sums = p.dweight != nullptr && p.rows > chunk;
  }

  int64_t input_words() const { return chunk * feature_steps; }
  int64_t right_words() const { return round_up(row_steps * columns, 16); }
  int64_t weights_words() const { return gradient ? blocks * chunk * width * sizeof(S) / 4 : 0; }
  int64_t statistics_words() const { return round_up(blocks * chunk * sizeof(BlockStatistics) / 4, 16); }
  int64_t row_words() const { return chunk * (2 + 2 + 1 + sizeof(RowGradient) / 4); }  // index, target, logit, gradient
  int64_t part_words() const { return round_up(chunk * columns, 16); }
  int64_t sum_words(const LinearCrossEntropyParams& p) const {
    return sums ? round_up(ceil_div(p.classes * p.features * WeightSum<T>::bytes, 4), 16) : 0;
  }
  int64_t lost_words(const LinearCrossEntropyParams& p) const {
    return p.dbias != nullptr ? round_up(p.classes, 16) : 0;
  }

  int64_t logits_words() const { return width * feature_steps + kTileRows * width; }
  int64_t gradient_words(const LinearCrossEntropyParams& p) const {
    return round_up(class_steps * columns, 16) + chunk * class_steps + round_up(width * row_steps, 16) +
           (p.dweight != nullptr ? round_up(kTileRows * columns, 16) : 0) + width;
  }
  int64_t scratch(const LinearCrossEntropyParams& p) const {
    return max_of(logits_words(), gradient ? gradient_words(p) : 0);
  }
  int64_t shared(const LinearCrossEntropyParams& p) const {
    return round_up(chunk * p.features * static_cast<int64_t>(sizeof(T)) / 4 + 1, 16) + input_words() +
           (gradient ? right_words() : 0) + weights_words() + statistics_words() + row_words() + parts * part_words() +
           sum_words(p) + lost_words(p);
  }
};

inline int64_t threads_of(const LinearCrossEntropyParams& p) {
  return min_of(max_threads(), 1 + p.rows * p.features / 1000 * p.classes / 1000);
}

}  // namespace
}  // namespace torchweld::cpu
