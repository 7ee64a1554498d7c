// The gradient of an additive bias, in the attention backward. Where every score has a bias of its own, the tiles store
// it as they make it. A bias that is broadcast takes a pass of its own, which makes the products again: 2 Nq Nk (D +
// Dv) FLOPs per head, but no memory, and no sum over tasks whatever the broadcast is.
#pragma once

#include "cpu/attention/backward_plan.h"

namespace torchweld::cpu {
namespace {

template <class T, class Compute>
class BiasGradient {
  using Plan = BackwardPlan<T, Compute>;
  using Tile = typename Plan::Tile;

 public:
  BiasGradient(const AttentionBackwardParams& p, const Plan& plan) : p_(p), plan_(plan) {}

  bool wanted() const { return p_.dbias != nullptr; }

  // Whether every score has a bias of its own.
  bool dense() const {
    const int64_t* extent = p_.dbias_extents;
    return wanted() && extent[0] == p_.batch && extent[1] == p_.heads && extent[2] == p_.queries &&
           extent[3] == p_.keys;
  }

  // The part of a dense gradient that belongs to a query head, [Nq, Nk], and zeros in it where the tiles store nothing.
  void* of_head(int64_t head) const { return static_cast<char*>(p_.dbias) + head * head_bytes(); }
  void clear(int64_t head) const {
    if (p_.left < kUnbounded || p_.right < kUnbounded) std::memset(of_head(head), 0, head_bytes());
  }

  // The gradient of a bias that is broadcast. A task owns a tile of dbias and sums over whatever bias is broadcast to,
  // in one order. queries_of(head): the GradientQueries of a query head.
  template <class QueriesOf>
  void sum(int64_t threads, int64_t scratch_words, QueriesOf&& queries_of) const {
    const int64_t* extent = p_.dbias_extents;
    const int64_t row_tiles = extent[2] > 1 ? ceil_div(p_.queries, Tile::kQueries) : 1;
    const int64_t key_tiles = extent[3] > 1 ? ceil_div(p_.keys, plan_.tile_keys) : 1;
    parallel_queue(extent[0] * extent[1] * row_tiles * key_tiles, threads, [&](int64_t task, int64_t thread) {
      const int64_t kt = task % key_tiles, qt = task / key_tiles % row_tiles, outer = task / key_tiles / row_tiles;
      const Span batches = slice(outer / extent[1], extent[0], 1, p_.batch),
                 heads = slice(outer % extent[1], extent[1], 1, p_.heads);
      const Span rows = slice(qt, extent[2], Tile::kQueries, p_.queries),
                 keys = slice(kt, extent[3], plan_.tile_keys, p_.keys);
      const TileScope tiles;
      float* scratch = p_.workspace + thread * scratch_words;
      float* sums = scratch + Tile::scratch_words(p_, plan_.tile_keys);
      std::memset(sums, 0, sizeof(float) * Tile::kQueries * plan_.tile_keys);
      for (int64_t b = batches.begin; b < batches.end; ++b)
        for (int64_t h = heads.begin; h < heads.end; ++h) {
          const Scores scores(p_, b, h);
          for (int64_t j0 = keys.begin; j0 < keys.end; j0 += plan_.tile_keys) {
            const int64_t width = min_of(plan_.tile_keys, keys.end - j0);
            Tile tile(p_, b, h / (p_.heads / p_.kv_heads), j0, width, plan_.tile_keys, scratch);
            for (int64_t i0 = rows.begin; i0 < rows.end; i0 += Tile::kQueries)
              tile.add_dbias(scores, queries_of(b * p_.heads + h), {i0, min_of(i0 + Tile::kQueries, rows.end)}, sums,
                             plan_.tile_keys);
          }
        }
      store_tile(sums, outer, rows, keys);
    });
  }

 private:
  int64_t head_bytes() const { return p_.queries * p_.keys * (p_.bias_type == MaskType::float32 ? 4 : 2); }

  // Tile `index` of an axis of `size`; all of it where bias is broadcast.
  static Span slice(int64_t index, int64_t extent, int64_t tile, int64_t size) {
    return extent > 1 ? Span{index * tile, min_of((index + 1) * tile, size)} : Span{0, size};
  }

  // Rows of tile_keys sums; what bias is broadcast to is added up first.
  void store_tile(float* sums, int64_t outer, Span rows, Span keys) const {
    const int64_t *extent = p_.dbias_extents, stride = plan_.tile_keys, width = min_of(keys.end - keys.begin, stride);
    int64_t count = min_of(rows.end - rows.begin, Tile::kQueries), row = outer * extent[2] + rows.begin;
    if (extent[2] == 1) {
      for (int64_t r = 1; r < count; ++r)
        for (int64_t j = 0; j < width; j += W) store(sums + j, load(sums + j) + load(sums + r * stride + j));
      count = 1;
    }
    dispatch(p_.bias_dtype(), [&](auto t) {
      auto* out =
          static_cast<typename decltype(t)::type*>(p_.dbias) + row * extent[3] + (extent[3] == 1 ? 0 : keys.begin);
      for (int64_t r = 0; r < count; ++r, out += extent[3], sums += stride) {
        if (extent[3] == 1)
          store(out, splat(sum_over(width, [&](int64_t j, auto lanes) { return load(sums + j, lanes); })), First{1});
        else
          for_each_vector(width, [&](int64_t j, auto lanes) { store(out + j, load(sums + j), lanes); });
      }
    });
  }

  const AttentionBackwardParams& p_;
  const Plan& plan_;
};

}  // namespace
}  // namespace torchweld::cpu
