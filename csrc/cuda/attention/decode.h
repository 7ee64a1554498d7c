// The forward for a few queries per key head, to which attention_forward hands such calls, and that over a cache in
// blocks: when, and how it is cut.
#pragma once

#include "params.h"

namespace torchweld::cuda {

constexpr int kDecodeRows = 16;            // of a tile: queries of all query heads that share a key head
constexpr int64_t kDecodeBlocks = 528;     // 4 blocks on each multiprocessor of an H100
constexpr int kDecodeKeys = 64;            // splits are multiples of this
constexpr int64_t kDecodeSplitKeys = 256;  // and not shorter than this
constexpr int kDecodeCombineWarps = 4;

inline bool decodes(const AttentionForwardParams& p) {
  return p.kv_heads > 0 && p.cu_seqlens_q == nullptr && p.dropout.seed == nullptr &&
         p.heads / p.kv_heads * p.queries <= kDecodeRows;
}

// Of each key head.
inline int64_t decode_tiles(const AttentionForwardParams& p) {
  return p.kv_heads > 0 ? (p.heads / p.kv_heads * p.queries + kDecodeRows - 1) / kDecodeRows : 0;
}

inline int64_t decode_splits(const AttentionForwardParams& p) {
  const int64_t tiles = p.batch * p.kv_heads * decode_tiles(p),
                most = (p.keys + kDecodeSplitKeys - 1) / kDecodeSplitKeys;
  const int64_t wanted = kDecodeBlocks / (tiles > 0 ? tiles : 1);
  return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

// Floats: of each split the outputs, and two values per row.
inline int64_t decode_workspace(const AttentionForwardParams& p) {
  const int64_t splits = decode_splits(p);
  return splits > 1 ? splits * p.batch * p.heads * p.queries * (p.value_dim + 2) : 0;
}

}  // namespace torchweld::cuda
