// A kernel of one warp that multiplies two tiles with the functions of csrc/cuda/attention/sm80/products.cuh. A test
// compares it with plain matrix products.
#pragma once

#include "params/types.h"

namespace emulation {

struct Products {
  const void *a, *b;  // [16, size], rows `stride` apart; rows of b from `rows` on must not be read
  int64_t stride;
  int size, padded, rows;
  bool vectorized;
  float *inner, *outer;  // [16, 16] a @ b^T, [16, size] inner @ b
};

void products(const Products& p, torchweld::DType dtype);

}  // namespace emulation
