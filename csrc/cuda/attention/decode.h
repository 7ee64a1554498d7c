// Decoding: the forward for few queries per key head, over contiguous or paged keys. When it applies, and how the keys
// are split over blocks.
#pragma once

#include "params/attention.h"

namespace torchweld::cuda::attention {

constexpr int kDecodeRows = 16;            // rows of a tile: the queries of all query heads that share a key head
constexpr int64_t kDecodeBlocks = 528;     // blocks wanted in all: 4 per multiprocessor of an H100
constexpr int kDecodeKeys = 64;            // a split has a multiple of this
constexpr int64_t kDecodeSplitKeys = 256;  // and at least this many keys
constexpr int kDecodeCombineWarps = 4;

inline bool decodes(const AttentionForwardParams& p) {
  return p.kv_heads > 0 && p.cu_seqlens_q == nullptr && p.dropout.seed == nullptr &&
         p.heads / p.kv_heads * p.queries <= kDecodeRows;
}

// Tiles of each key head.
inline int64_t decode_tiles(const AttentionForwardParams& p) {
  return p.kv_heads > 0 ? (p.heads / p.kv_heads * p.queries + kDecodeRows - 1) / kDecodeRows : 0;
}

inline int64_t decode_splits(const AttentionForwardParams& p) {
  const int64_t tiles = p.batch * p.kv_heads * decode_tiles(p),
                most = (p.keys + kDecodeSplitKeys - 1) / kDecodeSplitKeys;
  const int64_t wanted = kDecodeBlocks / (tiles > 0 ? tiles : 1);
  return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

// In floats: each split's outputs and two statistics per row.
inline int64_t decode_workspace(const AttentionForwardParams& p) {
  const int64_t splits = decode_splits(p);
  return splits > 1 ? splits * p.batch * p.heads * p.queries * (p.value_dim + 2) : 0;
}

}  // namespace torchweld::cuda::attention
