// The building blocks of csrc/cuda/attention/products.cuh in a kernel of one warp, to be held to plain matrix products.
#pragma once

#include "params.h"

namespace emulation {

struct Products {
  const void *a, *b;  // [16, size], rows `stride` apart; rows of b from `rows` on are not read
  int64_t stride;
  int size, padded, rows;
  bool packets;
  float *inner, *outer;  // [16, 16] a @ b^T, [16, size] inner @ b
};

void products(const Products& p, torchweld::DType dtype);

}  // namespace emulation
