// One tile of the attention backward: some queries against some keys. From the packed operands it makes P and dscores,
// and from those the three gradients, each a product of gemm.h. Nothing is transposed on the way: as left operands, P and
// dscores are read by columns for dkey and dvalue and by rows for dquery. In bf16 a word holds neighbours along the
// summed dimension, so both are kept with pairs of queries, and dscores with pairs of keys as well.
#pragma once

#include "cpu/attention_scores.h"

namespace torchweld::cpu {
namespace {

template <class T>
class GradientTile {
  using Compute = typename ComputeOf<T>::type;
  static constexpr bool kPairs = Compute::per_word == 2;
  static constexpr int64_t kScoreRows = 48;  // so many rows of products at a time, so that they stay in L1

 public:
  static constexpr int64_t kQueries = kPairs ? 192 : 96;

  // The query side of one query head, shared by all tiles of keys: statistics and operands.
  struct Queries {
    float *lse, *lse_rest, *delta;  // [Nq]; lse in units of log2 as a sum of two, +inf where nothing is seen
    Left query, doutput;        // as left operands, rows of words
    Right query_steps, doutput_steps;  // as right operands, steps of queries

    static int64_t words(const AttentionBackwardParams& p) {
      return 3 * round_up(p.queries, 16) + left_words(p.queries, p.query_strides.row, p.dim) +
             left_words(p.queries, p.doutput_strides.row, p.value_dim) + right_words(p.queries, p.dim) +
             right_words(p.queries, p.value_dim);
    }

    Queries(const AttentionBackwardParams& p, int64_t b, int64_t h, float* memory) {
      const int64_t rows = p.queries, qs = p.query_strides.row, ds = p.doutput_strides.row;
      auto take = [&](int64_t words) {
        float* part = memory;
        memory += words;
        return part;
      };
      lse = take(round_up(rows, 16));
      lse_rest = take(round_up(rows, 16));
      delta = take(round_up(rows, 16));
      const T* q = head_of<T>(p.query, p.query_strides, b, h);
      const T* dout = head_of<T>(p.doutput, p.doutput_strides, b, h);
      query = left(q, qs, p.dim, take(left_words(rows, qs, p.dim)));
      doutput = left(dout, ds, p.value_dim, take(left_words(rows, ds, p.value_dim)));
      query_steps = right(q, qs, p.dim, take(right_words(rows, p.dim)));
      doutput_steps = right(dout, ds, p.value_dim, take(right_words(rows, p.value_dim)));
    }

    // Fills rows [begin, end), begin even.
    void pack(const AttentionBackwardParams& p, int64_t b, int64_t h, int64_t begin, int64_t end) const {
      const T* q = head_of<T>(p.query, p.query_strides, b, h) + begin * p.query_strides.row;
      const T* dout = head_of<T>(p.doutput, p.doutput_strides, b, h) + begin * p.doutput_strides.row;
      const T* out = head_of<T>(p.output, p.output_strides, b, h) + begin * p.output_strides.row;
      const int64_t first = p.row(b, h);
      for (int64_t i = begin; i < end; ++i, dout += p.doutput_strides.row, out += p.output_strides.row) {
        const float total = sum_over(p.value_dim, [&](int64_t d, auto lanes) { return load(dout + d, lanes) * load(out + d, lanes); });
        const float l = p.lse[first + i];
        lse[i] = l == -kInfinity ? kInfinity : l * kLog2e;
        lse_rest[i] = l == -kInfinity ? 0.0f : __builtin_fmaf(l, kLog2e, -lse[i]) + l * kLog2eRest;
        delta[i] = p.dlse != nullptr ? total - p.dlse[first + i] : total;
      }
      dout -= (end - begin) * p.doutput_strides.row;
      pack_side(q, p.query_strides.row, begin, end, p.dim, query, query_steps);
      pack_side(dout, p.doutput_strides.row, begin, end, p.value_dim, doutput, doutput_steps);
    }

   private:
    // Room for operands that cannot be read where they lie.
    static int64_t left_words(int64_t rows, int64_t stride, int64_t dim) {
      return left_in_place<T, Compute>(stride, dim) ? 0 : round_up(rows * ceil_div(dim, Compute::per_word), 16);
    }
    static int64_t right_words(int64_t rows, int64_t dim) {
      return right_in_place<T, Compute>(dim) ? 0 : round_up(ceil_div(rows, Compute::per_word) * round_up(dim, W), 16);
    }

    static Left left(const T* rows, int64_t stride, int64_t dim, const float* packed) {
      if (left_in_place<T, Compute>(stride, dim)) return {reinterpret_cast<const float*>(rows), stride / Compute::per_word, 1};
      return {packed, ceil_div(dim, Compute::per_word), 1};
    }
    static Right right(const T* rows, int64_t stride, int64_t dim, const float* packed) {
      if (right_in_place<T, Compute>(dim)) return {reinterpret_cast<const float*>(rows), stride, kPanel};
      return {packed, round_up(dim, W), kPanel};
    }
    static void pack_side(const T* rows, int64_t stride, int64_t begin, int64_t end, int64_t dim, const Left& l, const Right& r) {
      if (!left_in_place<T, Compute>(stride, dim))
        pack_left<T, Compute>(rows, stride, end - begin, dim, const_cast<float*>(l.data) + begin * l.row);
      if (!right_in_place<T, Compute>(dim))
        pack_rows<T, Compute>(rows, stride, end - begin, dim, const_cast<float*>(r.data) + begin / Compute::per_word * r.step);
    }
  };

  static int64_t scratch_words(const AttentionInputs& p, int64_t tile_keys) {
    const int64_t stride = tile_keys + 16;
    return tile_keys * (ceil_div(p.dim, Compute::per_word) + ceil_div(p.value_dim, Compute::per_word)) +  // key^T, value^T
           tile_keys / Compute::per_word * round_up(p.dim, W) +                                           // key
           3 * kScoreRows * stride + (kPairs ? 3 : 4) * kQueries * stride / 2;
  }

  // Packs keys [j0, j0 + keys) of key head (b, hk).
  GradientTile(const AttentionInputs& p, int64_t b, int64_t hk, int64_t j0, int64_t keys, int64_t tile_keys, float* scratch)
      : p_(p), j0_(j0), keys_(keys), stride_(tile_keys + 16) {
    auto take = [&](int64_t words) {
      float* part = scratch;
      scratch += words;
      return part;
    };
    const int64_t key_steps = ceil_div(p.dim, Compute::per_word), value_steps = ceil_div(p.value_dim, Compute::per_word);
    const T* k = head_of<T>(p.key, p.key_strides, b, hk) + j0 * p.key_strides.row;
    const T* v = head_of<T>(p.value, p.value_strides, b, hk) + j0 * p.value_strides.row;
    float* key = take(tile_keys * key_steps);
    float* value = take(tile_keys * value_steps);
    float* steps = take(tile_keys / Compute::per_word * round_up(p.dim, W));
    pack_transposed<T, Compute>(k, p.key_strides.row, keys, p.dim, key);
    pack_transposed<T, Compute>(v, p.value_strides.row, keys, p.value_dim, value);
    key_ = {key, kPanel, kPanel * key_steps};
    value_ = {value, kPanel, kPanel * value_steps};
    if (right_in_place<T, Compute>(p.dim)) {
      key_steps_ = {reinterpret_cast<const float*>(k), p.key_strides.row, kPanel};
    } else {
      pack_rows<T, Compute>(k, p.key_strides.row, keys, p.dim, steps);
      key_steps_ = {steps, round_up(p.dim, W), kPanel};
    }
    products_ = take(kScoreRows * stride_);
    dprobability_ = take(kScoreRows * stride_);
    slopes_ = take(kScoreRows * stride_);
    probability_ = take(kQueries / Compute::per_word * stride_);
    dscore_ = take(kQueries / Compute::per_word * stride_);
    dscore_rows_ = kPairs ? take(kQueries * stride_ / 2) : dscore_;
  }

  // P and dscores of queries [queries.begin, queries.end), begin even.
  void score(const Scores& scores, const Queries& rows, Span queries) {
    products(scores, rows, queries, [&](int64_t i, int64_t count, int64_t r, Span span) __attribute__((always_inline)) {
      differentiate(scores, rows, i, count, i - queries.begin, r, span);
    });
  }

  // The sum of what each of the scores receives times -|i + shift - j|: what the slope of ALiBi receives.
  double slope_gradient(const Scores& scores, const Queries& rows, Span queries) {
    double total = 0;
    products(scores, rows, queries, [&](int64_t i, int64_t count, int64_t r, Span span) __attribute__((always_inline)) {
      float factors[kTileKeysMost];
      for (int64_t n = 0; n < count; ++n) {
        scores.finish(products_ + (r + n) * stride_, i + n, j0_, span, nullptr);
        if (scores.dropout.active()) drop(scores, i + n, r + n, span, factors);
        const Vec lse = splat(rows.lse[i + n]), rest = splat(rows.lse_rest[i + n]), delta = splat(rows.delta[i + n]);
        Vec distance = scores.distance(i + n, j0_ + span.begin), sums{};
        for (int64_t j = span.begin; j < span.end; j += W, distance += static_cast<float>(W))
          sums -= dscore((r + n) * stride_ + j, scores.unit(), lse, rest, delta).gradient * from_bits(bits(distance) & 0x7fffffffu);
        total += sum(sums);
      }
    });
    return total;
  }

  // The gradient of the scores after the softcap, added to [kQueries, tile_keys]: what an additive bias receives.
  void add_dbias(const Scores& scores, const Queries& rows, Span queries, float* dbias, int64_t stride) {
    products(scores, rows, queries, [&](int64_t i, int64_t count, int64_t r, Span span) __attribute__((always_inline)) {
      float factors[kTileKeysMost];
      for (int64_t n = 0; n < count; ++n) {
        scores.finish(products_ + (r + n) * stride_, i + n, j0_, span, nullptr);
        if (scores.dropout.active()) drop(scores, i + n, r + n, span, factors);
        float* out = dbias + (i + n - queries.begin) * stride;
        const Vec lse = splat(rows.lse[i + n]), rest = splat(rows.lse_rest[i + n]), delta = splat(rows.delta[i + n]);
        for (int64_t j = span.begin; j < span.end; j += W)
          store(out + j, load(out + j) + dscore((r + n) * stride_ + j, scores.unit(), lse, rest, delta).gradient);
      }
    });
  }

  void add_dvalue(const Queries& rows, Span queries, float* dv) const {
    add_by_key({probability_, 1, stride_}, rows.doutput_steps, queries, round_up(p_.value_dim, W), dv);
  }
  void add_dkey(const Queries& rows, Span queries, float* dk) const {
    add_by_key({dscore_, 1, stride_}, rows.query_steps, queries, round_up(p_.dim, W), dk);
  }

  // dq: the whole head's, [Nq, round_up(D, W)].
  void add_dquery(Span queries, float* dq) const {
    const Band band(p_);
    Span steps[kQueries / kRows];
    for (int64_t i = queries.begin; i < queries.end; i += kRows) {
      const int64_t low = max_of(band.low(i) - j0_, 0);
      const int64_t high = min_of(band.high(min_of(i + kRows, queries.end) - 1) - j0_, keys_);
      steps[(i - queries.begin) / kRows] = low < high ? Span{low / Compute::per_word, ceil_div(high, Compute::per_word)} : Span{0, 0};
    }
    const int64_t width = round_up(p_.dim, W);
    gemm_accumulate<Compute>(queries.end - queries.begin, width, {dscore_rows_, stride_ / Compute::per_word, 1}, key_steps_, steps,
                             dq + queries.begin * width, width);
  }

 private:
  // Rows of keys: each block sums over the queries that see one of its keys.
  void add_by_key(const Left& left, const Right& right, Span queries, int64_t width, float* out) const {
    const Band band(p_);
    Span steps[kTileKeysMost / kRows];
    for (int64_t r = 0; r < keys_; r += kRows) {
      const int64_t first = max_of(band.first(j0_ + r), queries.begin) - queries.begin;
      const int64_t last = min_of(band.last(j0_ + min_of(r + kRows, keys_)), queries.end) - queries.begin;
      steps[r / kRows] = first < last ? Span{first / Compute::per_word, ceil_div(last, Compute::per_word)} : Span{0, 0};
    }
    gemm_accumulate<Compute>(keys_, width, left,
                             {right.data + queries.begin / Compute::per_word * right.step, right.step, right.panel}, steps, out, width);
  }

  // Products of so many rows at a time, then body(i, count, r, span) for every per_word rows: queries [i, i + count) are
  // rows r and on of the products, which are there for columns span.
  template <class Body>
  TW_INLINE void products(const Scores& scores, const Queries& rows, Span queries, Body&& body) {
    for (int64_t i0 = queries.begin; i0 < queries.end; i0 += kScoreRows) {
      const int64_t count = min_of(kScoreRows, queries.end - i0);
      Span columns[kScoreRows / kRows];
      for (int64_t m = 0; m < count; m += kRows) {
        const int64_t low = max_of(scores.band.low(i0 + m) - j0_, 0);
        const int64_t high = min_of(scores.band.high(i0 + min_of(m + kRows, count) - 1) - j0_, keys_);
        columns[m / kRows] = low < high ? Span{round_down(low, W), round_up(high, W)} : Span{0, 0};
      }
      gemm_store<Compute>(count, ceil_div(p_.dim, Compute::per_word), rows_from(rows.query, i0), key_, columns, products_, stride_);
      gemm_store<Compute>(count, ceil_div(p_.value_dim, Compute::per_word), rows_from(rows.doutput, i0), value_, columns,
                          dprobability_, stride_);
      for (int64_t r = 0; r < count; r += Compute::per_word)
        body(i0 + r, min_of(Compute::per_word, count - r), r, columns[r / kRows]);
    }
  }

  // Dropout's factors in the row of query i, and dP of row r multiplied by them.
  void drop(const Scores& scores, int64_t i, int64_t r, Span span, float* factors) const {
    scores.dropout.factors(factors, i, j0_, span);
    float* row = dprobability_ + r * stride_;
    for (int64_t j = span.begin; j < span.end; j += W) store(row + j, load(row + j) * load(factors + j));
  }

  struct Score {
    Vec probability, gradient;
  };

  TW_INLINE Score dscore(int64_t at, float unit, Vec lse, Vec lse_rest, Vec delta) const {
    const Vec p = exp2<Compute::exp_degree>((load(products_ + at) * unit - lse) - lse_rest);
    // Where nothing is seen, value may hold a NaN.
    return {p, p == zero() ? zero() : p * (load(dprobability_ + at) - delta)};
  }

  // P and dscores of `count` neighbouring rows (a pair, or one) from query i on, row t of the tile.
  TW_INLINE void differentiate(const Scores& scores, const Queries& rows, int64_t i, int64_t count, int64_t t, int64_t r,
                               Span span) {
    constexpr int kCount = Compute::per_word;
    const bool capped = p_.softcap != 0, dropping = scores.dropout.active();
    float factors[kCount][kTileKeysMost];
    Vec lse[kCount], rest[kCount], delta[kCount];
    for (int n = 0; n < kCount; ++n) {
      if (n >= count) continue;
      lse[n] = splat(rows.lse[i + n]);
      rest[n] = splat(rows.lse_rest[i + n]);
      delta[n] = splat(rows.delta[i + n]);
      scores.finish(products_ + (r + n) * stride_, i + n, j0_, span, capped ? slopes_ + (r + n) * stride_ : nullptr);
      if (dropping) drop(scores, i + n, r + n, span, factors[n]);
    }
    float* p_row = probability_ + t / kCount * stride_;
    float* ds_row = dscore_ + t / kCount * stride_;
    auto write = [&](int64_t j, const Score (&score)[kCount]) __attribute__((always_inline)) {
      if constexpr (kPairs) {
        const VecH even = narrow_bf16(score[0].gradient), odd = narrow_bf16(score[1].gradient);
        store(p_row + j, pair(narrow_bf16(score[0].probability), narrow_bf16(score[1].probability)));
        store(ds_row + j, pair(even, odd));
        store_bits(reinterpret_cast<bf16*>(dscore_rows_) + t * stride_ + j, even, All{});
        store_bits(reinterpret_cast<bf16*>(dscore_rows_) + (t + 1) * stride_ + j, odd, All{});
      } else {
        store(p_row + j, score[0].probability);
        store(ds_row + j, score[0].gradient);
      }
    };
    const Score nothing[kCount] = {};
    for (int64_t j = 0; j < span.begin; j += W) write(j, nothing);
    for (int64_t j = span.begin; j < span.end; j += W) {
      Score score[kCount] = {};
      for (int n = 0; n < kCount; ++n) {
        if (n >= count) continue;
        const int64_t at = (r + n) * stride_ + j;
        score[n] = dscore(at, scores.unit(), lse[n], rest[n], delta[n]);
        if (capped) score[n].gradient = score[n].gradient * load(slopes_ + at);
        if (dropping) score[n].probability = score[n].probability * load(factors[n] + j);
      }
      write(j, score);
    }
    for (int64_t j = span.end; j < keys_; j += W) write(j, nothing);
  }

  TW_INLINE static Vec pair(VecH even, VecH odd) {
    return from_bits(__builtin_convertvector(even, VecU) | (__builtin_convertvector(odd, VecU) << 16));
  }

  static constexpr int64_t kTileKeysMost = 192;

  const AttentionInputs& p_;
  const int64_t j0_, keys_, stride_;
  Right key_, value_, key_steps_;  // key^T, value^T, key
  float *products_, *dprobability_, *slopes_;  // [kScoreRows, stride]
  float *probability_, *dscore_;               // [kQueries / per_word, stride] words along the queries
  float* dscore_rows_;                         // [kQueries, stride / per_word] words along the keys
};

}  // namespace
}  // namespace torchweld::cpu
