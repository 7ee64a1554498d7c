// The query side of the attention backward: of one query head, what all tiles of keys share.
#pragma once

#include "cpu/attention/scores.h"

namespace torchweld::cpu {
namespace {

// The query side of one query head, shared by all tiles of keys: statistics and operands.
template <class T, class Compute>
struct GradientQueries {
  float *max, *inverse, *delta;         // [Nq]; max is 0 where nothing is seen
  const float* dlse;                    // [Nq], nullptr: none
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
    dlse = p.dlse != nullptr ? p.dlse + p.row(b, h) : nullptr;
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

  // Whether delta is rowsum(P * dP) - dlse where one tile holds all keys of a row, and not rowsum(doutput * output) -
  // dlse: then it is of the very numbers that dscores are made of. In 16 bits P and dscores are rounded by more than
  // that is worth, and the output is in float32.
  static constexpr bool summed = sizeof(T) == 4;

  // Fills rows [begin, end), begin even.
  void pack(const AttentionBackwardParams& p, int64_t b, int64_t h, int64_t begin, int64_t end,
            int64_t tile_keys) const {
    const T* q = head_of<T>(p.query, p.query_strides, b, h) + begin * p.query_strides.row;
    const T* dout = head_of<T>(p.doutput, p.doutput_strides, b, h) + begin * p.doutput_strides.row;
    const Band band(p);
    for (int64_t i = begin; i < end; ++i, dout += p.doutput_strides.row) {
      const float total = summed && band.in_one_tile(i, tile_keys) ? 0.0f
                          : p.output_dtype == DType::float32       ? dot<float>(p, b, h, i, dout)
                                                                   : dot<T>(p, b, h, i, dout);
      fill_statistics(p, p.row(b, h), i);
      delta[i] = dlse != nullptr ? total - dlse[i] : total;
    }
    dout -= (end - begin) * p.doutput_strides.row;
    pack_side(q, p.query_strides.row, begin, end, p.dim, query, query_steps, query_columns);
    pack_side(dout, p.doutput_strides.row, begin, end, p.value_dim, doutput, doutput_steps, doutput_columns);
  }

 private:
  // The sum of doutput * output of query i.
  template <class Output>
  static float dot(const AttentionBackwardParams& p, int64_t b, int64_t h, int64_t i, const T* doutput) {
    const Output* output = head_of<Output>(p.output, p.output_strides, b, h) + i * p.output_strides.row;
    return sum_over(p.value_dim,
                    [&](int64_t d, auto lanes) { return load(doutput + d, lanes) * load(output + d, lanes); });
  }

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
      pack_columns<T, Compute>(rows, stride, end - begin, dim,
                               const_cast<float*>(columns.data) + Compute::Layout::at_step(first), columns.row);
    else if (!right_in_place<T, Compute>(dim))
      pack_rows<T, Compute>(rows, stride, end - begin, dim, const_cast<float*>(r.data) + first * r.step, 0);
  }
};

}  // namespace
}  // namespace torchweld::cpu
