// The forward for a few queries per key head, to which attention_forward hands such calls: when, and how it is cut.
#pragma once

#include "params.h"

namespace torchweld::cuda {

constexpr int kDecodeRows = 16;            // queries of all query heads that share a key head
constexpr int64_t kDecodeBlocks = 528;     // 4 blocks on each multiprocessor of an H100
constexpr int64_t kDecodeKeys = 64;        // splits are multiples of this
constexpr int64_t kDecodeSplitKeys = 256;  // and not shorter than this
constexpr int kDecodeCombineWarps = 4;

inline bool decodes(const AttentionForwardParams& p) {
  return p.kv_heads > 0 && p.cu_seqlens_q == nullptr && p.dropout.seed == nullptr &&
         p.heads / p.kv_heads * p.queries <= kDecodeRows;
}

inline int64_t decode_splits(const AttentionForwardParams& p) {
  const int64_t heads = p.batch * p.kv_heads, most = (p.keys + kDecodeSplitKeys - 1) / kDecodeSplitKeys;
  const int64_t wanted = kDecodeBlocks / (heads > 0 ? heads : 1);
  return wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most;
}

}  // namespace torchweld::cuda
