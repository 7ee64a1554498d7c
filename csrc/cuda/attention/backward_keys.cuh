// What the kernels backward_keys of both families share: how they are scheduled, and how they store their results.
#pragma once

#include "cuda/attention/backward.cuh"

namespace torchweld::cuda::attention {

// Stores dkey and dvalue of this warp's keys, from row0 on, where they are wanted.
template <class T, bool kPlain, int MT, int K, int V>
__device__ __forceinline__ void store_dkey_dvalue(const Backward& p, const Head& own, int row0,
                                                  const float (&dkey)[MT][K][4], const float (&dvalue)[MT][V][4]) {
  auto store = [&](const auto& gradient, void* base, const Strides& strides, int64_t size, float factor) {
    T* to = own.key_rows(static_cast<T*>(base), strides);
    store_rows<T>(
        gradient, static_cast<int>(size), p.pairs,
        [&](int m, int half) {
          const int j = row0 + m * 16 + lane_row() + half * 8;
          return j < own.keys ? to + j * strides.row : nullptr;
        },
        [&](int, int) { return factor; });
  };
  if (K > 1 && p.dkey != nullptr) store(dkey, p.dkey, p.dkey_strides, p.dim, p.scale);
  if (V > 1 && p.dvalue != nullptr)
    store(dvalue, p.dvalue, p.dvalue_strides, p.value_dim,
          !kPlain && p.dropout.seed != nullptr ? p.dropout.scale : 1.0f);
}

// Fills in what a launch with blocks of `rows` keys needs.
template <class T>
void schedule_keys(Backward& p, int rows) {
  p.vectorized = reads_vectorized<T>(p);
  p.pairs = writes_pairs<T>(p);
  p.schedule = Schedule(p.batch * p.kv_heads, p.keys, rows, 1,
                        p.queries * (p.dim + p.value_dim) * sizeof(T) * (p.heads / p.kv_heads), true);
}

}  // namespace torchweld::cuda::attention
