// The query side of the attention backward: of one query head, what all tiles of keys share.
#pragma once

#include "cpu/attention_scores.h"

namespace torchweld::cpu {
namespace {

// Of up to 32 rows a and b, their scalar products: bit for bit what the products of gemm.h make of such a pair. `left`:
// the rows of a packed; scratch: that of a tile. Both for tiles alone.
template <class T, class Compute>
void row_products(int64_t rows, const T* a, int64_t a_stride, [[maybe_unused]] const Left& left, const T* b,
                  int64_t b_stride, int64_t dim, [[maybe_unused]] float* scratch, float* out) {
  const int64_t steps = words_of<Compute>(dim);
  if constexpr (Compute::tiles) {
    const TileScope tiles;
    const Span columns{0, 32};
    float* products = scratch + 32 * steps;
    pack_transposed<T, Compute>(b, b_stride, rows, dim, scratch);
    gemm_store<Compute>(rows, steps, left, {scratch, Compute::panel, Compute::panel * steps}, &columns, products, 32);
    for (int64_t r = 0; r < rows; ++r) out[r] = products[r * 32 + r];
  } else {
    for (int64_t r = 0; r < rows; r += W) {
      Vec total{};
      for (int64_t k = 0; k < steps; k += Compute::chain) {
        Vec chain{};
        for (int64_t d = k; d < min_of(k + Compute::chain, steps); d += W) {
          Vec x[W] = {}, y[W] = {};
          for (int64_t n = 0; n < min_of(W, rows - r); ++n) {
            Vec words[1];
            load_words<T, Compute>(a + (r + n) * a_stride, d, dim, words);
            x[n] = words[0];
            load_words<T, Compute>(b + (r + n) * b_stride, d, dim, words);
            y[n] = words[0];
          }
          transpose(x);
          transpose(y);
          for (int n = 0; n < W; ++n) chain = Compute::dot(x[n], y[n], chain);
        }
        total = k == 0 ? chain : total + chain;
      }
      store(out + r, total);
    }
  }
}

// The query side of one query head, shared by all tiles of keys: statistics and operands.
template <class T, class Compute>
struct GradientQueries {
  float *max, *inverse, *delta;         // [Nq]; max is 0 where nothing is seen
  Left query, doutput;                  // as left operands, rows of words
  Right query_steps, doutput_steps;     // as right operands, steps of queries
  Left query_columns, doutput_columns;  // in their place with tiles: transposed, rows of words along the queries

  static int64_t words(const AttentionBackwardParams& p) {
    return 3 * round_up(p.queries, 16) + left_words(p.queries, p.query_strides.row, p.dim) +
           left_words(p.queries, p.doutput_strides.row, p.value_dim) + right_words(p.queries, p.dim) +
           right_words(p.queries, p.value_dim);
  }

  GradientQueries(const AttentionBackwardParams& p, int64_t b, int64_t h, float* memory) {
    const int64_t rows = p.queries, qs = p.query_strides.row, ds = p.doutput_strides.row;
    auto take = [&](int64_t words) {
      float* part = memory;
      memory += words;
      return part;
    };
    max = take(round_up(rows, 16));
    inverse = take(round_up(rows, 16));
    delta = take(round_up(rows, 16));
    const T* q = head_of<T>(p.query, p.query_strides, b, h);
    const T* dout = head_of<T>(p.doutput, p.doutput_strides, b, h);
    query = left(q, qs, p.dim, take(left_words(rows, qs, p.dim)));
    doutput = left(dout, ds, p.value_dim, take(left_words(rows, ds, p.value_dim)));
    float* q_steps = take(right_words(rows, p.dim));
    float* dout_steps = take(right_words(rows, p.value_dim));
    query_steps = right(q, qs, p.dim, q_steps);
    doutput_steps = right(dout, ds, p.value_dim, dout_steps);
    query_columns = {q_steps, words_of<Compute>(rows), 1};
    doutput_columns = {dout_steps, words_of<Compute>(rows), 1};
  }

  // Fills rows [begin, end), begin a multiple of 32; scratch: that of a tile. delta is rowsum(doutput * output) - dlse.
  // Where one tile of keys holds all that a row sees, GradientTile::score sums P * dP in place of the products.
  void pack(const AttentionBackwardParams& p, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t tile_keys,
            float* scratch) const {
    const T* q = head_of<T>(p.query, p.query_strides, b, h) + begin * p.query_strides.row;
    const T* dout = head_of<T>(p.doutput, p.doutput_strides, b, h) + begin * p.doutput_strides.row;
    const T* out = head_of<T>(p.output, p.output_strides, b, h) + begin * p.output_strides.row;
    pack_side(q, p.query_strides.row, begin, end, p.dim, query, query_steps, query_columns);
    pack_side(dout, p.doutput_strides.row, begin, end, p.value_dim, doutput, doutput_steps, doutput_columns);
    const Band band(p);
    const int64_t first = p.row(b, h);
    for (int64_t i = begin; i < end; i += 32) {
      const int64_t count = min_of(32, end - i);
      bool whole[32], all = true;
      for (int64_t n = 0; n < count; ++n) all &= whole[n] = band.in_one_tile(i + n, tile_keys);
      float sums[32] = {};
      if (!all)
        row_products<T, Compute>(count, dout + (i - begin) * p.doutput_strides.row, p.doutput_strides.row,
                                 rows_from(doutput, i), out + (i - begin) * p.output_strides.row, p.output_strides.row,
                                 p.value_dim, scratch, sums);
      for (int64_t n = 0; n < count; ++n) {
        fill_statistics(p, first, i + n);
        const float total = whole[n] ? 0.0f : sums[n];
        delta[i + n] = p.dlse != nullptr ? total - p.dlse[first + i + n] : total;
      }
    }
  }

 private:
  void fill_statistics(const AttentionBackwardParams& p, int64_t first, int64_t i) const {
    const float m = p.max[first + i];
    if (m == -kInfinity) {
      max[i] = inverse[i] = 0.0f;
    } else if (p.inverse != nullptr) {
      max[i] = m;
      inverse[i] = p.inverse[first + i];
    } else {  // lse
      max[i] = m / score_unit(p);
      inverse[i] = __builtin_expf(__builtin_fmaf(max[i], score_unit(p), -m));
    }
  }

  // Room for operands that cannot be read where they lie.
  static int64_t left_words(int64_t rows, int64_t stride, int64_t dim) {
    return left_in_place<T, Compute>(stride, dim) ? 0 : round_up(rows, 16) * words_of<Compute>(dim);
  }
  static int64_t right_words(int64_t rows, int64_t dim) {
    if (Compute::tiles) return round_up(dim, W) * words_of<Compute>(rows);
    return right_in_place<T, Compute>(dim) ? 0 : round_up(ceil_div(rows, Compute::per_word) * round_up(dim, W), 16);
  }

  static Left left(const T* rows, int64_t stride, int64_t dim, const float* packed) {
    if (left_in_place<T, Compute>(stride, dim))
      return {reinterpret_cast<const float*>(rows), stride / Compute::per_word, 1};
    return {packed, words_of<Compute>(dim), 1};
  }
  static Right right(const T* rows, int64_t stride, int64_t dim, const float* packed) {
    if (right_in_place<T, Compute>(dim)) return {reinterpret_cast<const float*>(rows), stride, kPanel};
    return {packed, round_up(dim, W), kPanel};
  }
  static void pack_side(const T* rows, int64_t stride, int64_t begin, int64_t end, int64_t dim, const Left& l,
                        const Right& r, const Left& columns) {
    if (!left_in_place<T, Compute>(stride, dim))
      pack_left<T, Compute>(rows, stride, end - begin, dim, const_cast<float*>(l.data) + begin * l.row);
    const int64_t first = words_of<Compute>(begin);
    if constexpr (Compute::tiles)
      pack_columns<T, Compute>(rows, stride, end - begin, dim, const_cast<float*>(columns.data) + first * 16,
                               columns.row);
    else if (!right_in_place<T, Compute>(dim))
      pack_rows<T, Compute>(rows, stride, end - begin, dim, const_cast<float*>(r.data) + first * r.step, 0);
  }
};

}  // namespace
}  // namespace torchweld::cpu
