// The softmax of a tile of queries, over the tiles of keys that it sees, one after the other: m and l of every row, and
// P.
//
// m need not be the maximum: any estimate will do that keeps exp within the range of float32. So a row takes the
// maximum of the first scores it sees, and a tile of keys is weighed in one pass, a chunk after the other while it is
// in L1. Only where that overflows is the tile weighed again, against its true maximum. m is always a score that is
// seen, bit for bit, so its weight is 1 and a sum is 1 at least.
#pragma once

#include "cpu/attention/scores.h"

namespace torchweld::cpu {
namespace {

template <class Compute>
constexpr int64_t kTileQueries = 96;

template <class Compute>
constexpr int64_t kTileKeys = Compute::per_word / Compute::parts == 2 ? 512 : 256;

// Products are made and weighed for so many rows and keys at a time. Whole tiles, in place, where the micro-kernel
// wants to keep a panel of keys in L1 for many rows; with tile registers, few enough that they never leave L1
// themselves.
template <class Compute>
constexpr int64_t kGroup = Compute::tiles ? (Compute::parts == 1 ? 16 : 32) : kTileQueries<Compute>;
template <class Compute>
constexpr int64_t kChunk = Compute::parts == 3 ? 64
                           : Compute::tiles    ? 128
                                               : kTileKeys<Compute>;

// Weights of one tile may add up to this in a lane before they are weighed again. Their precision does not depend on
// their size, but in float32 that of a large exponent would be the worse for it.
template <class Compute>
constexpr float kMostWeight = Compute::per_word / Compute::parts == 2 ? 0x1p40f : 0x1p12f;

template <class Compute>
class Softmax {
  static constexpr int64_t kBlockRows = Compute::block_rows, kBlocks = kTileQueries<Compute> / kBlockRows;
  static_assert(kTileQueries<Compute> % kBlockRows == 0 &&
                    (kGroup<Compute> % kBlockRows == 0 || kBlockRows % kGroup<Compute> == 0),
                "whole blocks");

 public:
  // Whether a part is weighed between the products of the next one: pays where an element has several products.
  static constexpr bool kOverlap = Compute::parts > 1;
  // In words, of a row of products and of weights. No powers of two: rows would share cache sets.
  static constexpr int64_t product_stride = kChunk<Compute> + 16;
  static constexpr int64_t weight_stride = Compute::tiles ? kTileKeys<Compute> / 2 * Compute::parts : product_stride;
  // Of products: those at hand, or with tiles a whole row of chunks that is weighed again.
  static constexpr int64_t product_words =
      Compute::tiles ? kGroup<Compute> * product_stride * max_of(kTileKeys<Compute> / kChunk<Compute>, 2) : 0;

  // A tile of queries against a tile of keys.
  struct Tile {
    int64_t i0, j0, rows, steps;  // steps: words of a query
    const Span* columns;          // that each block of rows sees
    Left queries;
    Transposed<Compute> keys;
    float *products, *weights;  // room for them; the weights are wanted
    float* sums;                // [rows, width] P @ value of the tiles before
    int64_t width;

    // What row r sees of the columns [begin, begin + kChunk), counted from there.
    TW_INLINE Span seen(int64_t r, int64_t begin) const {
      const Span span = columns[r / kBlockRows];
      return {max_of(span.begin - begin, 0), min_of(span.end - begin, kChunk<Compute>)};
    }
  };

  // exact: whether the sums are wanted in float32. Else P is as exact as the words it is kept in, and the sums are of
  // those words: the weights that values are multiplied by then add up to 1.
  void init(int64_t rows, bool exact) {
    exact_ = exact;
    for (int64_t r = 0; r < round_up(rows, W); ++r) {
      max_[r] = -kInfinity;
      sum_[r] = zero();
    }
  }

  // P of the tile; where m is raised, `sums` are scaled to it.
  void weigh(const Scores& scores, const Tile& at) {
    weigh_once(scores, at);
    for (int64_t r = 0; r < at.rows; r += kGroup<Compute>)
      if (!add_weights(r, min_of(r + kGroup<Compute>, at.rows))) weigh_again(scores, at, r);
  }

  // Of rows [r, r + W), whose sums are final.
  Vec max(int64_t r) const { return load(max_ + r); }
  TW_INLINE Vec sum(int64_t r) const {
    Vec sums[W];
    for (int n = 0; n < W; ++n) sums[n] = sum_[r + n];
    return reduce(sums, [](Vec a, Vec b) { return a + b; });
  }

 private:
  // What to subtract from the scores of row r: -inf - -inf would be NaN.
  float subtract(int64_t r) const { return max_[r] == -kInfinity ? 0.0f : max_[r]; }

  // Row r sees scores up to `largest`; returns what its sums so far are to be multiplied by.
  float raise(int64_t r, float largest, float unit) {
    const float before = max_[r];
    max_[r] = largest > before ? largest : before;
    const float factor = __builtin_exp2f((before - subtract(r)) * unit);
    sum_[r] = sum_[r] * factor;
    return factor;
  }

  // Rows [first, first + kGroup) and columns [begin, begin + kChunk).
  template <class Between = Nothing>
  TW_INLINE void multiply(const Tile& at, int64_t first, int64_t begin, float* products, Between&& between = {}) const {
    const int64_t count = min_of(kGroup<Compute>, at.rows - first);
    Span part[kBlocks];
    for (int64_t n = 0; n < count; n += kBlockRows) part[n / kBlockRows] = at.seen(first + n, begin);
    at.keys.from(begin, at.steps)
        .multiply(count, at.steps, rows_from(at.queries, first), part, products, product_stride, between);
  }

  static TW_INLINE Vec largest(const float* row, Span span) {
    Vec a = splat(-kInfinity), b = a;
    int64_t j = span.begin;
    for (; j + 2 * W <= span.end; j += 2 * W) {
      a = vmax(load(row + j), a);
      b = vmax(load(row + j + W), b);
    }
    if (j < span.end) a = vmax(load(row + j), a);
    return vmax(a, b);
  }

  // P of a row of scores; returns its sums. In place, a row of P is never ahead of its scores, also where it takes half
  // the room.
  template <bool kExact>
  static TW_INLINE Vec exponentiate(const float* row, float* p, Span span, Vec unit, Vec max) {
    constexpr int kDegree = kExact ? kExactDegree<Compute> : Compute::exp_degree;
    constexpr bool kOfWords = !kExact && Compute::per_word == 2 && Compute::parts == 1;
    Vec a{}, b{};
    int64_t j = span.begin;
    for (; j + 2 * W <= span.end; j += 2 * W) {
      const Vec first = weight<kDegree>(load(row + j), max, unit);
      const Vec second = weight<kDegree>(load(row + j + W), max, unit);
      Compute::store_row(p, j, first, second);
      if constexpr (kOfWords) {
        a = Compute::dot(load(p + Compute::element(j) / 2), from_bits(VecU{} + 0x3f803f80u), a);  // times 1, in pairs
      } else {
        a += first;
        b += second;
      }
    }
    if (j < span.end) {
      const Vec last = weight<kDegree>(load(row + j), max, unit);
      Compute::store_row(p, j, last);
      if constexpr (kOfWords)
        a += load(reinterpret_cast<const bf16*>(p) + Compute::element(j));
      else
        a += last;
    }
    return a + b;
  }

  // P of row r in the chunk of columns that starts at c, of which it sees `span`; returns the sums.
  TW_INLINE Vec weigh_row(const Scores& scores, const Tile& at, int64_t r, int64_t c, Span span,
                          const float* row) const {
    float* p = Compute::row_of(at.weights, weight_stride, r) + Compute::element(c) / Compute::per_word;
    const Vec unit = splat(scores.unit()), max = splat(subtract(r));
    const Vec sums =
        exact_ ? exponentiate<true>(row, p, span, unit, max) : exponentiate<false>(row, p, span, unit, max);
    if (scores.dropout.active()) scores.dropout.template drop<Compute>(p, at.i0 + r, at.j0 + c, span);
    return sums;
  }

  // P of the tile, and its sums as weight_. A chunk of keys stays in cache for all rows.
  TW_INLINE void weigh_once(const Scores& scores, const Tile& at) {
    int64_t begin = kTileKeys<Compute>, end = 0;
    for (int64_t r = 0; r < at.rows; r += kBlockRows) {
      const Span span = at.columns[r / kBlockRows];
      if (span.begin >= span.end) continue;
      begin = min_of(begin, round_down(span.begin, kChunk<Compute>));
      end = max_of(end, span.end);
    }
    for (int64_t r = 0; r < at.rows; ++r) weight_[r] = zero();
    if (begin >= end) return;

    const int64_t groups = ceil_div(at.rows, kGroup<Compute>), parts = groups * ceil_div(end - begin, kChunk<Compute>);
    Part pending{};
    for (int64_t n = 0; n < parts; ++n) {
      const int64_t first = n % groups * kGroup<Compute>, c = begin + n / groups * kChunk<Compute>;
      Part part{{first, min_of(first + kGroup<Compute>, at.rows)}, c, at.products};
      if constexpr (kOverlap) {
        part.products += n % 2 * kGroup<Compute> * product_stride;
        const Span span = at.seen(first, c);
        // How often a square of tiles calls in between, over all of them: `rows` are spread evenly.
        const int64_t lines = max_of((span.end - span.begin) / 32 * at.steps / 8, 1);
        const int64_t rows = pending.rows.end - pending.rows.begin;
        int64_t due = 0;
        multiply(at, first, c, part.products, [&]() __attribute__((always_inline)) {
          for (due += rows; due >= lines && pending.rows.begin < pending.rows.end; due -= lines)
            weigh_next(scores, at, pending);
        });
      } else {
        multiply(at, first, c, part.products);
      }
      while (pending.rows.begin < pending.rows.end) weigh_next(scores, at, pending);
      const bool bare =
          scores.bare(at.i0 + first, at.i0 + part.rows.end, at.j0 + c, at.j0 + min_of(c + kChunk<Compute>, end));
      for (int64_t r = first; r < part.rows.end; r += W)
        prepare(scores, at, {r, min_of(r + W, part.rows.end)}, c, bare, part.products + (r - first) * product_stride);
      pending = part;
      if constexpr (!kOverlap) {
        while (pending.rows.begin < pending.rows.end) weigh_next(scores, at, pending);
      }
    }
    while (pending.rows.begin < pending.rows.end) weigh_next(scores, at, pending);
  }

  // Up to W rows of a chunk of columns: their scores, and maxima of those that have none.
  TW_INLINE void prepare(const Scores& scores, const Tile& at, Span rows, int64_t c, bool bare, float* products) {
    bool fresh = false;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const Span span = at.seen(r, c);
      if (span.begin >= span.end) continue;
      if (!bare) scores.finish(products + (r - rows.begin) * product_stride, at.i0 + r, at.j0 + c, span, nullptr);
      fresh |= max_[r] == -kInfinity;
    }
    if (!fresh) return;
    Vec top[W];
    for (int n = 0; n < W; ++n) {
      const Span span = rows.begin + n < rows.end ? at.seen(rows.begin + n, c) : Span{0, 0};
      top[n] = span.begin < span.end ? largest(products + n * product_stride, span) : splat(-kInfinity);
    }
    const Vec before = load(max_ + rows.begin), tops = reduce(top, [](Vec a, Vec b) { return vmax(a, b); });
    store(max_ + rows.begin, before == splat(-kInfinity) ? tops : before);
  }

  // Rows whose scores in the columns from c on are final, but which are not weighed yet.
  struct Part {
    Span rows;
    int64_t c;
    float* products;
  };

  __attribute__((noinline)) void weigh_next(const Scores& scores, const Tile& at, Part& part) {
    const int64_t r = part.rows.begin++;
    const Span span = at.seen(r, part.c);
    if (span.begin < span.end) weight_[r] += weigh_row(scores, at, r, part.c, span, part.products);
    part.products += product_stride;
  }

  // Adds the weights of rows [first, last) to their sums; false, and nothing is added, where one has become too large.
  TW_INLINE bool add_weights(int64_t first, int64_t last) {
    Vec most{};
    for (int64_t r = first; r < last; ++r) most = vmax(weight_[r], most);
    if (!(cpu::max_of(most) <= kMostWeight<Compute>)) return false;
    for (int64_t r = first; r < last; ++r) sum_[r] += weight_[r];
    return true;
  }

  // A group of rows, against the true maximum of what each has seen.
  __attribute__((noinline)) void weigh_again(const Scores& scores, const Tile& at, int64_t first) {
    constexpr int64_t kChunks = kTileKeys<Compute> / kChunk<Compute>;
    auto row_of = [&](int64_t chunk, int64_t r) {
      return at.products + (chunk * kGroup<Compute> + r - first) * product_stride;
    };
    for (int64_t chunk = 0; chunk < kChunks; ++chunk)
      multiply(at, first, chunk * kChunk<Compute>, row_of(chunk, first));
    for (int64_t r = first; r < min_of(first + kGroup<Compute>, at.rows); ++r) {
      Vec top = splat(-kInfinity);
      for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
        const Span span = at.seen(r, chunk * kChunk<Compute>);
        if (span.begin >= span.end) continue;
        scores.finish(row_of(chunk, r), at.i0 + r, at.j0 + chunk * kChunk<Compute>, span, nullptr);
        top = vmax(largest(row_of(chunk, r), span), top);
      }
      const float factor = raise(r, cpu::max_of(top), scores.unit());
      float* out = at.sums + r * at.width;
      for (int64_t i = 0; i < at.width; i += W) store(out + i, load(out + i) * factor);
      for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
        const Span span = at.seen(r, chunk * kChunk<Compute>);
        if (span.begin < span.end) sum_[r] += weigh_row(scores, at, r, chunk * kChunk<Compute>, span, row_of(chunk, r));
      }
    }
  }

  // m is as finish() of Scores leaves it, l a sum per lane; weights are those of the tile at hand.
  alignas(64) float max_[kTileQueries<Compute>];
  Vec sum_[kTileQueries<Compute>], weight_[kTileQueries<Compute>];
  bool exact_;
};

}  // namespace
}  // namespace torchweld::cpu
