// The forward for a few queries per key head and no lse, to which attention_forward hands such calls.
#pragma once

#include "params.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kDecodeRows = 4;  // from about here on the packed products win

inline bool decodes(const AttentionForwardParams& p) {
  return p.lse == nullptr && p.kv_heads > 0 && p.heads / p.kv_heads * p.queries <= kDecodeRows;
}

}  // namespace

namespace TORCHWELD_ISA {

int64_t attention_decode_workspace(const AttentionForwardParams& p);
void attention_decode(const AttentionForwardParams& p);

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
