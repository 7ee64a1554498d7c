// One tile of the attention backward: some queries against some keys. From the packed operands it makes P and dscores
// (gradient_operands.h), and from those the three gradients, each a product of matmul/matmul.h. Nothing is transposed
// on the way. With tiles dkey and dvalue come out transposed.
#pragma once

#include "cpu/attention/gradient_keys.h"
#include "cpu/attention/gradient_operands.h"

namespace torchweld::cpu {
namespace {

template <class T, class Compute>
class GradientTile {
  using Operands = GradientOperands<Compute>;
  using Score = typename Operands::Score;
  static constexpr int64_t kScoreRows = Compute::tiles ? (Compute::parts == 1 ? 16 : 32) : 48;  // at a time, in L1
  static constexpr int64_t kBlockRows = Compute::block_rows;

 public:
  static constexpr int64_t kQueries = Operands::kQueries;
  using Queries = GradientQueries<T, Compute>;
  using Keys = GradientKeys<T, Compute>;
  using Shared = typename Keys::Shared;

  static int64_t scratch_words(const AttentionInputs& p, int64_t tile_keys) {
    return Keys::words(p, tile_keys) + 3 * kScoreRows * Operands::stride_of(tile_keys) + Operands::words(tile_keys);
  }

  // Packs keys [j0, j0 + keys) of key head (b, hk); shared: see SharedKeys.
  GradientTile(const AttentionInputs& p, int64_t b, int64_t hk, int64_t j0, int64_t keys, int64_t tile_keys,
               float* scratch, const float* shared = nullptr)
      : p_(p),
        j0_(j0),
        keys_(keys),
        width_(round_up(keys, Compute::column_unit)),
        tile_keys_(tile_keys),
        stride_(Operands::stride_of(tile_keys)),
        exact_(Compute::exp_degree < kExactDegree<Compute> && exact_softmax(p)),
        right_(p, b, hk, j0, keys, tile_keys, scratch, shared),
        operands_(tile_keys, scratch + scratch_words(p, tile_keys) - Operands::words(tile_keys)) {
    scratch += Keys::words(p, tile_keys);
    float** const rows[] = {&products_, &dprobability_, &slopes_};
    for (float** part : rows) *part = scratch, scratch += kScoreRows * stride_;
  }

  // Where score() leaves the gradient of the bias of this head, [Nq, Nk]; nullptr: nowhere.
  void* dbias = nullptr;

  // P and dscores of queries [queries.begin, queries.end), begin even.
  void score(const Scores& scores, const Queries& rows, Span queries) {
    products(scores, rows, queries, [&](int64_t i, int64_t count, int64_t r, Span span) __attribute__((always_inline)) {
      differentiate(scores, rows, i, count, i - queries.begin, r, span);
    });
    if constexpr (Compute::tiles) {
      // Zeros in the rows up to a multiple of 32: the products of tiles read whole blocks.
      const int64_t count = queries.end - queries.begin;
      const Score nothing[2] = {};
      for (int64_t t = round_up(count, 2); t < round_up(count, 32); t += 2)
        for (int64_t j = 0; j < width_; j += W) operands_.write(t, j, nothing);
    }
  }

  // Of each query the sums of P * dP * |i + shift - j|, P * |i + shift - j| and P * dP, added to [kQueries, 3].
  void add_distances(const Scores& scores, const Queries& rows, Span queries, double* sums) {
    products(scores, rows, queries, [&](int64_t i, int64_t count, int64_t r, Span span) __attribute__((always_inline)) {
      float factors[kTileKeysMost];
      for (int64_t n = 0; n < count; ++n) {
        scores.finish(products_ + (r + n) * stride_, i + n, j0_, span, nullptr);
        if (scores.dropout.active()) drop(scores, i + n, r + n, span, factors);
        const Row row(rows, i + n, scores.unit());
        Vec signed_distance = scores.distance(i + n, j0_ + span.begin), total[3] = {};
        for (int64_t j = span.begin; j < span.end; j += W, signed_distance += static_cast<float>(W)) {
          const int64_t at = (r + n) * stride_ + j;
          const Vec p = probability<kExactDegree<Compute>>(at, row),
                    distance = from_bits(bits(signed_distance) & 0x7fffffffu);
          const Vec gradient = p == zero() ? zero() : p * load(dprobability_ + at);
          total[0] += gradient * distance;
          total[1] += p * distance;
          total[2] += gradient;
        }
        for (int k = 0; k < 3; ++k) sums[(i + n - queries.begin) * 3 + k] += static_cast<double>(sum(total[k]));
      }
    });
  }

  // The gradient of the scores after the softcap, added to [kQueries, tile_keys]: what an additive bias receives.
  void add_dbias(const Scores& scores, const Queries& rows, Span queries, float* dbias, int64_t stride) {
    products(scores, rows, queries, [&](int64_t i, int64_t count, int64_t r, Span span) __attribute__((always_inline)) {
      float factors[kTileKeysMost];
      for (int64_t n = 0; n < count; ++n) {
        scores.finish(products_ + (r + n) * stride_, i + n, j0_, span, nullptr);
        if (scores.dropout.active()) drop(scores, i + n, r + n, span, factors);
        float* out = dbias + (i + n - queries.begin) * stride;
        const Row row(rows, i + n, scores.unit());
        for (int64_t j = span.begin; j < span.end; j += W) {
          const int64_t at = (r + n) * stride_ + j;
          store(out + j, load(out + j) + dscore(at, row, probability<kExactDegree<Compute>>(at, row)).gradient);
        }
      }
    });
  }

  // dv: [keys, round_up(Dv, W)]; with tiles [round_up(Dv, W), tile_keys]. So dk.
  void add_dvalue(const Queries& rows, Span queries, float* dv) const {
    add_by_key(operands_.probability, rows.doutput_steps, rows.doutput_columns, queries, round_up(p_.value_dim, W), dv);
  }
  void add_dkey(const Queries& rows, Span queries, float* dk) const {
    add_by_key(operands_.dscore, rows.query_steps, rows.query_columns, queries, round_up(p_.dim, W), dk);
  }

  // The same where `queries` are all, of one query head, and vectors are whole: rows of `out`, stored as they are made.
  void store_dvalue(const Queries& rows, Span queries, T* out, int64_t stride) const {
    store_by_key(operands_.probability, rows.doutput_steps, queries, p_.value_dim, 1.0f, out, stride);
  }
  void store_dkey(const Queries& rows, Span queries, T* out, int64_t stride) const {
    store_by_key(operands_.dscore, rows.query_steps, queries, p_.dim, p_.scale, out, stride);
  }

  // dq: the whole head's, [Nq, round_up(D, W)].
  void add_dquery(Span queries, float* dq) const {
    const Band band(p_);
    Span steps[kQueries / kBlockRows];
    for (int64_t i = queries.begin; i < queries.end; i += kBlockRows) {
      const int64_t low = max_of(band.low(i) - j0_, 0);
      const int64_t high = min_of(band.high(min_of(i + kBlockRows, queries.end) - 1) - j0_, keys_);
      steps[(i - queries.begin) / kBlockRows] = steps_between<Compute>(low, high);
    }
    const int64_t width = round_up(p_.dim, W);
    gemm_accumulate<Compute>(queries.end - queries.begin, width, operands_.by_key(), right_.steps, steps,
                             dq + queries.begin * width, width);
  }

 private:
  // Keys: each block of them sums over the queries that see one of it. by_query: P or dscores.
  Span steps_of(const Band& band, int64_t r, Span queries) const {
    const int64_t first = max_of(band.first(j0_ + r), queries.begin) - queries.begin;
    const int64_t last = min_of(band.last(j0_ + min_of(r + kBlockRows, keys_)), queries.end) - queries.begin;
    return steps_between<Compute>(first, last);
  }

  void store_by_key(const float* by_query, const Right& right, Span queries, int64_t dim, float factor, T* out,
                    int64_t stride) const {
    const Band band(p_);
    const float* rows = right.data + words_of<Compute>(queries.begin) * right.step;
    for (int64_t r = 0; r < keys_; r += kBlockRows) {
      const Span steps = steps_of(band, r, queries);
      for (int64_t j = r; j < min_of(r + kBlockRows, keys_); ++j)
        for (int64_t d = 0; d < dim; d += W) {
          Vec sum{};
          for (int64_t k = steps.begin; k < steps.end; ++k)
            sum = Compute::dot(splat(by_query[k * stride_ + j]), load(rows + k * right.step + d), sum);
          store(out + j * stride + d, sum * factor, All{});
        }
    }
  }

  void add_by_key(const float* by_query, const Right& right, const Left& columns, Span queries, int64_t width,
                  float* out) const {
    const Band band(p_);
    Span steps[kTileKeysMost / kBlockRows];
    for (int64_t r = 0; r < keys_; r += kBlockRows) steps[r / kBlockRows] = steps_of(band, r, queries);
    const int64_t first = words_of<Compute>(queries.begin);
    if constexpr (Compute::tiles) {
      for (int64_t r = 0; r < keys_; r += kBlockRows)
        for (int64_t m = 0; m < width; m += kBlockRows)
          gemm_accumulate<Compute>(min_of(kBlockRows, width - m), kBlockRows,
                                   {columns.data + m * columns.row + Compute::Layout::at_step(first), columns.row, 1},
                                   operands_.right_by_query(by_query, r), &steps[r / kBlockRows],
                                   out + m * tile_keys_ + r, tile_keys_);
    } else {
      gemm_accumulate<Compute>(keys_, width, operands_.left_by_query(by_query),
                               {right.data + first * right.step, right.step, right.panel}, steps, out, width);
    }
  }

  // Products of so many rows at a time, then body(i, count, r, span) for every per_word rows: queries [i, i + count)
  // are rows r and on of the products, which are there for columns span.
  template <class Body>
  TW_INLINE void products(const Scores& scores, const Queries& rows, Span queries, Body&& body) {
    for (int64_t i0 = queries.begin; i0 < queries.end; i0 += kScoreRows) {
      const int64_t count = min_of(kScoreRows, queries.end - i0);
      Span columns[ceil_div(kScoreRows, kBlockRows)];
      for (int64_t m = 0; m < count; m += kBlockRows) {
        const int64_t low = max_of(scores.band.low(i0 + m) - j0_, 0);
        const int64_t high = min_of(scores.band.high(i0 + min_of(m + kBlockRows, count) - 1) - j0_, keys_);
        columns[m / kBlockRows] =
            low < high ? Span{round_down(low, Compute::column_unit), round_up(high, Compute::column_unit)} : Span{0, 0};
      }
      right_.key.multiply(count, words_of<Compute>(p_.dim), rows_from(rows.query, i0), columns, products_, stride_);
      right_.value.multiply(count, words_of<Compute>(p_.value_dim), rows_from(rows.doutput, i0), columns, dprobability_,
                            stride_);
      for (int64_t r = 0; r < count; r += Compute::per_word)
        body(i0 + r, min_of(Compute::per_word, count - r), r, columns[r / kBlockRows]);
    }
  }

  // Dropout's factors in the row of query i, and dP of row r multiplied by them.
  void drop(const Scores& scores, int64_t i, int64_t r, Span span, float* factors) const {
    scores.dropout.factors(factors, i, j0_, span);
    float* row = dprobability_ + r * stride_;
    for (int64_t j = span.begin; j < span.end; j += W) store(row + j, load(row + j) * load(factors + j));
  }

  // What probabilities and gradients of a row's scores are made of.
  struct Row {
    Vec max, inverse, unit, delta, dlse;

    Row() = default;
    Row(const Queries& rows, int64_t i, float score_unit)
        : max(splat(rows.max[i])),
          inverse(splat(rows.inverse[i])),
          unit(splat(score_unit)),
          delta(splat(rows.delta[i])),
          dlse(splat(rows.dlse != nullptr ? rows.dlse[i] : 0.0f)) {}
  };

  template <int kDegree>
  TW_INLINE Vec probability(int64_t at, const Row& row) const {
    return weight<kDegree>(load(products_ + at), row.max, row.unit) * row.inverse;
  }

  // P * (dP - delta). Where P is 1 but for roundings, delta is dP - dlse: of the difference nothing else than the
  // roundings of two sums would be left, and of an output in 16 bits.
  TW_INLINE Score dscore(int64_t at, const Row& row, Vec p) const {
    const Vec gradient = p * (load(dprobability_ + at) - row.delta);
    // Where nothing is seen, value may hold a NaN.
    return {p, p == zero() ? zero() : p >= splat(1 - 0x1p-22f) ? row.dlse : gradient};
  }

  // Whether the tile holds all that query i sees.
  bool holds_all(const Band& band, int64_t i) const {
    const int64_t low = band.low(i), high = band.high(i);
    return !band.part && low < high && j0_ <= low && high <= j0_ + keys_;
  }

  // P of query i, exact, in the place of its scores, row r. Returns the sum of P * dP.
  __attribute__((noinline)) float sum_gradients(const Queries& rows, int64_t i, float unit, int64_t r,
                                                Span span) const {
    const Row row(rows, i, unit);
    Vec total{};
    for (int64_t j = span.begin; j < span.end; j += W) {
      const int64_t at = r * stride_ + j;
      const Vec p = probability<kExactDegree<Compute>>(at, row);
      store(products_ + at, p);
      total += p == zero() ? zero() : p * load(dprobability_ + at);
    }
    return sum(total);
  }

  // P and dscores of `count` neighbouring rows (a pair, or one) from query i on, row t of the tile.
  TW_INLINE void differentiate(const Scores& scores, const Queries& rows, int64_t i, int64_t count, int64_t t,
                               int64_t r, Span span) {
    constexpr int kCount = Compute::per_word;
    const bool capped = p_.softcap != 0, dropping = scores.dropout.active();
    float factors[kCount][kTileKeysMost];
    Row row[kCount];
    bool made = exact_;  // whether P is there before the loop that writes it
    for (int n = 0; n < kCount; ++n) {
      if (n >= count) continue;
      row[n] = Row(rows, i + n, scores.unit());
      scores.finish(products_ + (r + n) * stride_, i + n, j0_, span, capped ? slopes_ + (r + n) * stride_ : nullptr);
      if (dropping) drop(scores, i + n, r + n, span, factors[n]);
      made |= Queries::summed && holds_all(scores.band, i + n);
    }
    for (int n = 0; n < kCount; ++n) {
      if (n >= count || !made) continue;
      const float total = sum_gradients(rows, i + n, scores.unit(), r + n, span);
      if (!Queries::summed || !holds_all(scores.band, i + n)) continue;
      rows.delta[i + n] += total;
      row[n].delta = splat(rows.delta[i + n]);
    }
    const Score nothing[kCount] = {};
    for (int64_t j = 0; j < span.begin; j += W) operands_.write(t, j, nothing);
    auto write_scores = [&](auto&& probability_of) __attribute__((always_inline)) {
      for (int64_t j = span.begin; j < span.end; j += W) {
        Score score[kCount] = {};
        for (int n = 0; n < kCount; ++n) {
          if (n >= count) continue;
          const int64_t at = (r + n) * stride_ + j;
          score[n] = dscore(at, row[n], probability_of(at, row[n]));
          if (dbias != nullptr) store(dprobability_ + at, score[n].gradient);
          if (capped) score[n].gradient = score[n].gradient * load(slopes_ + at);
          if (dropping) score[n].probability = score[n].probability * load(factors[n] + j);
        }
        operands_.write(t, j, score);
      }
    };
    if (made)
      write_scores([&](int64_t at, const Row&) { return load(products_ + at); });
    else
      write_scores([&](int64_t at, const Row& one) { return probability<Compute::exp_degree>(at, one); });
    for (int64_t j = span.end; j < width_; j += W) operands_.write(t, j, nothing);
    if (dbias != nullptr)
      for (int64_t n = 0; n < count; ++n) store_dbias(dprobability_ + (r + n) * stride_, i + n, span);
  }

  // The row of query i of a bias that is not broadcast.
  __attribute__((noinline)) void store_dbias(const float* gradient, int64_t i, Span span) const {
    dispatch(p_.bias_dtype(), [&](auto t) {
      auto* out = static_cast<typename decltype(t)::type*>(dbias) + i * p_.keys + j0_;
      const bool streaming = past_cache<typename decltype(t)::type>(dbias, p_.batch * p_.heads * p_.queries, p_.keys);
      for_each_vector(keys_, [&](int64_t j, auto lanes) {
        store_output(out + j, j >= span.begin && j < span.end ? load(gradient + j) : zero(), lanes, streaming);
      });
    });
  }

  static constexpr int64_t kTileKeysMost = 192;

  const AttentionInputs& p_;
  const int64_t j0_, keys_, width_, tile_keys_, stride_;
  const bool exact_;                           // P is made to kExactDegree, in a pass of its own
  const Keys right_;                           // keys and values as operands
  float *products_, *dprobability_, *slopes_;  // [kScoreRows, stride]
  Operands operands_;                          // P and dscores
};

}  // namespace
}  // namespace torchweld::cpu
