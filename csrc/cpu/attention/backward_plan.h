// How the attention backward shares its work: tiles and chunks of keys, and the memory that each sequence needs.
#pragma once

#include "cpu/attention/backward_tile.h"
#include "cpu/attention/sequences.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kTasks = 16;       // chunks of keys are made until there are so many tasks
constexpr int64_t kChunkKeys = 256;  // but none shorter than this
constexpr int64_t kTileKeys = 192;

// Sizes of a sequence, in words. share: of the work of all sequences.
template <class T, class Compute>
struct BackwardPlan {
  using Tile = GradientTile<T, Compute>;

  int64_t tile_keys, chunks, chunk;  // chunk: keys, a multiple of tile_keys
  int64_t key_width, value_width;    // of a row of dquery and dkey, of dvalue
  int64_t packed, partial;           // of each query head: packed rows; of each query head and chunk: dquery

  BackwardPlan(const AttentionBackwardParams& p, double share) {
    const int64_t tiles = max_of(ceil_div(p.keys, kTileKeys), 1);
    tile_keys = round_up(ceil_div(max_of(p.keys, 1), tiles), kPanel);
    const int64_t tasks = max_of(static_cast<int64_t>(kTasks * share), 1);
    const int64_t wanted = ceil_div(tasks, max_of(p.batch * p.kv_heads, 1)), most = max_of(p.keys / kChunkKeys, 1);
    chunk = round_up(ceil_div(max_of(p.keys, 1), min_of(wanted, most)), tile_keys);
    chunks = max_of(ceil_div(p.keys, chunk), 1);
    key_width = round_up(p.dim, W);
    value_width = round_up(p.value_dim, W);
    packed = Tile::Queries::words(p);
    partial = round_up(p.queries, 16) * key_width;  // tiles add zeros to rows past the last
  }

  int64_t tile_words(const AttentionBackwardParams& p) const {
    return Tile::scratch_words(p, tile_keys) +
           max_of(tile_keys * (key_width + value_width), Tile::kQueries * tile_keys);
  }
  // dalibi_slopes has a sum of its own for every query head and block of its queries.
  int64_t own_words(const AttentionBackwardParams& p) const {
    return p.batch * p.heads * (packed + chunks * partial) + Tile::Shared::words(p) +
           round_up(p.batch * p.heads * ceil_div(p.queries, Tile::kQueries) * 2, 16);
  }
};

}  // namespace
}  // namespace torchweld::cpu
