// What the forward kernels of both families share: their parameters and their launch.
#pragma once

#include "cuda/attention/dropout.cuh"
#include "cuda/attention/schedule.cuh"
#include "cuda/attention/softmax.cuh"

namespace torchweld::cuda::attention {

struct Forward : AttentionForwardParams {
  Schedule schedule;
  bool vectorized;  // the rows of query, key and value begin on 16 bytes
  bool pairs;       // the rows of output begin on two elements
};

template <class T>
void launch_forward(const AttentionForwardParams& params, int tile, void (*kernel)(Forward), int threads, size_t shared,
                    Stream stream) {
  Forward p{params};
  p.schedule = Schedule(p.batch * p.heads, p.queries, tile, p.heads / p.kv_heads,
                        p.keys * (p.dim + p.value_dim) * sizeof(T), false);
  if (p.schedule.empty()) return;
  p.vectorized =
      rows_aligned(16, sizeof(T), {p.query, p.key, p.value}, {p.query_strides, p.key_strides, p.value_strides});
  p.pairs = rows_aligned(2 * sizeof(T), sizeof(T), {p.output}, {p.output_strides});
  launch("attention_forward", kernel, p.schedule.grid(), dim3(threads), shared, stream, p);
}

}  // namespace torchweld::cuda::attention
