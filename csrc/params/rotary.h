// The params of rotary_embedding: it rotates pairs (x, z) of the first R elements of a head,
//
//   output = (x cos - z sin, z cos + x sin)
//
// with cos and sin from row `position` of two tables. A pair is (i, i + R / 2), or (2 i, 2 i + 1) if interleaved. A
// table has a column for each element or, unless interleaved, for each pair. The position of token (b, n) is
// position_ids[b, n], or n.
#pragma once

#include "params/types.h"

namespace torchweld {

struct RotaryTensor {
  int64_t heads;      // H, 0: there is no such tensor
  const void* input;  // [B, H, N, D]
  Strides input_strides;
  void* output;  // [B, H, N, D], which may be the input itself
  Strides output_strides;
};

struct RotaryParams {
  int64_t batch, tokens, dim, rotary_dim;  // B, N, D, R; the last D - R elements are copied
  bool interleaved;
  bool inverse;              // rotates back
  DType dtype, table_dtype;  // of the tensors; of the tables: float32 or `dtype`
  RotaryTensor query, key;
  const void *cos, *sin;                       // [P, C], with batch strides [B, P, C]; C is R or R / 2
  int64_t table_rows, table_cols;              // P, C
  int64_t cos_batch_stride, sin_batch_stride;  // 0: the same for all
  const int64_t* position_ids;                 // [B, N], nullptr: n
  int64_t position_batch_stride;               // N, or 0: the same for all
};

}  // namespace torchweld
