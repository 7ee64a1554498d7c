// The forward for a few queries per key head and no statistics, to which attention_forward hands such calls.
#pragma once

#include "params/attention.h"

namespace torchweld::cpu {
namespace {

inline bool decodes(const AttentionForwardParams& p) {
  if (p.lse != nullptr || p.max != nullptr || p.kv_heads == 0) return false;
  // With more rows the packed products win. With few keys the bits had better not depend on whether lse is wanted.
  const int64_t most = p.keys < 256 ? 4 : p.dtype == DType::float32 ? 32 : 16;
  return p.heads / p.kv_heads * p.queries <= most;
}

}  // namespace

namespace TORCHWELD_ISA {

int64_t attention_decode_workspace(const AttentionForwardParams& p);
void attention_decode(const AttentionForwardParams& p);

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
