// The params of attention and paged_attention: output = softmax(scores) @ value of each batch and head. The scores are,
// in this order,
//
//   query @ key^T * scale,  softcap * tanh(scores / softcap),  + bias,  - slope * |i + shift - j|
//
// and query i sees key j only where i + shift - left <= j <= i + shift + right. A sink adds exp(sink) to the softmax's
// denominator. Dropout multiplies the softmax by a mask. Hkv divides H: query head h uses key and value head
// h / (H / Hkv). Packed sequences lie one after another along the rows: [total_q, H, D] stands for [B, H, Nq, D], and
// [H, total_q] for [B, H, Nq]. B is then the number of sequences, and the stride of the batch is 0.
#pragma once

#include "params/types.h"
#include "philox.h"

namespace torchweld {

enum class MaskType : int32_t { none, boolean, float32, bfloat16, float16 };

// The rows of a dropout mask [B, H, Nq] of which a call has a part, as one of several devices does: query 0 of its head
// 0 is row `first`. Without a whole: 0, H and total_q of the call.
struct MaskRows {
  int64_t first, heads, queries;
};

struct AttentionInputs {
  int64_t batch, heads, kv_heads, queries, keys, dim,
      value_dim;                // B, H, Hkv, Nq, Nk, D, Dv; packed: the longest Nq, Nk
  int64_t total_q, total_k;     // rows of query, key and value: Nq, Nk unless packed
  const int32_t* cu_seqlens_q;  // [B + 1] where each sequence starts; nullptr: not packed
  const int32_t* cu_seqlens_k;  // [B + 1]
  int64_t first_row;            // 0; of one packed sequence: cu_seqlens_q of it
  DType dtype;                  // of query, key, value, output and their gradients
  float scale;
  float softcap;        // 0: none
  int64_t left, right;  // the band of keys that a query sees; at most kUnbounded
  bool bottom_right;    // shift is Nk - Nq, not 0
  int64_t offset;       // added to shift: queries and keys are parts of longer sequences
  bool part;            // of the keys of longer rows, of which output and statistics are in the backward
  Dropout dropout;      // the mask's rows are counted as mask_row() does, its columns as keys of the sequence
  MaskRows mask_rows;
  const void* query;  // [B, H, Nq, D]
  const void* key;    // [B, Hkv, Nk, D]
  const void* value;  // [B, Hkv, Nk, Dv]
  Strides query_strides, key_strides, value_strides;
  MaskType bias_type;
  const void* bias;            // [B, H, Nq, Nk], boolean (1: attend) or additive; nullptr: none
  Strides bias_strides;        // 0 where it is broadcast
  int64_t bias_step;           // along the keys: 1, or 0 where it is broadcast
  const float* alibi_slopes;   // [B, H], nullptr: none
  int64_t alibi_batch_stride;  // H, or 0 where it is broadcast
  const float* sinks;          // [H], nullptr: none
  float* workspace;            // as many elements as the op's workspace function asks for

  TW_HOST_DEVICE int64_t shift() const {
    return (bottom_right ? keys - queries : 0) + offset;
  }  // packed: of each sequence, from its own lengths

  // Where head (b, h) begins in what has one value per row, [B, H, Nq]. Packed: [H, total_q], b is 0 and the rows of a
  // sequence begin at `first_row`.
  TW_HOST_DEVICE int64_t row(int64_t b, int64_t h) const { return first_row + (b * heads + h) * total_q; }

  // Where head (b, h) begins in the rows of the dropout mask.
  TW_HOST_DEVICE int64_t mask_row(int64_t b, int64_t h) const {
    return mask_rows.first + first_row + (b * mask_rows.heads + h) * mask_rows.queries;
  }

  // Of an additive bias.
  DType bias_dtype() const {
    return bias_type == MaskType::bfloat16  ? DType::bfloat16
           : bias_type == MaskType::float16 ? DType::float16
                                            : DType::float32;
  }
};

constexpr int64_t kUnbounded = int64_t{1} << 40;

struct AttentionForwardParams : AttentionInputs {
  void* output;        // [B, H, Nq, Dv]
  float* wide_output;  // [B, H, Nq, Dv] before it is rounded to 16 bits, for the backward; nullptr: not wanted
  Strides output_strides, wide_output_strides;
  float* lse;  // [B, H, Nq] log of the softmax's denominator, -inf where a query sees nothing; nullptr: not wanted
  // [B, H, Nq] of what the backward makes the softmax again; nullptr: none will follow. lse would not do: its rounding
  // is one of exp(lse), and all that is left of it where scores are large.
  float* max;      // what is subtracted from a row's scores, in units of the kernel's own; -inf: the row sees nothing
  float* inverse;  // 1 / sum(exp(scores - max))
};

// A few queries over a cache in blocks: key j of batch b is row j % block_size of block block_table[b, j / block_size].
// key and value are [blocks, Hkv, block_size, D] and [.., Dv], the batch of their strides is a block. No batch has more
// than `keys`; shift is that of each batch, from its own number of keys.
struct PagedAttentionParams : AttentionForwardParams {
  const int32_t* block_table;    // [B, table_width]; those past the last key may be anything
  const int32_t* cache_seqlens;  // [B] keys of each batch
  int64_t table_width, block_size, blocks;
};

struct AttentionBackwardParams : AttentionInputs {
  const void* output;   // [B, H, Nq, Dv]
  DType output_dtype;   // float32 where it is the forward's wide_output
  const void* doutput;  // [B, H, Nq, Dv]
  Strides output_strides, doutput_strides;
  bool deterministic;    // the same bits on every run; else sums may be added up in any order
  const float* max;      // [B, H, Nq] as the forward left it; lse where there is no inverse
  const float* inverse;  // [B, H, Nq], nullptr: none
  const float* dlse;     // [B, H, Nq], nullptr: none
  void* dquery;          // [B, H, Nq, D], nullptr: not wanted; so for all that follow
  void* dkey;            // [B, Hkv, Nk, D]
  void* dvalue;          // [B, Hkv, Nk, Dv]
  Strides dquery_strides, dkey_strides, dvalue_strides;
  void* dbias;               // [dbias_extents] contiguous, of bias's dtype
  int64_t dbias_extents[4];  // B, H, Nq and Nk, or 1 where bias is broadcast
  float* dalibi_slopes;      // [B, H], to be summed over B where alibi_slopes is broadcast
  float* dsinks;             // [B, H], to be summed over B
};

}  // namespace torchweld
