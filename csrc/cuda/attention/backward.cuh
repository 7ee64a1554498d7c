// Attention, backward: what all its kernels share. The probabilities and the gradients of the scores,
//
//   P = exp(scores - max) / sum        dP = dropout(doutput @ value^T)        dS = P * (dP - delta)
//
// are recomputed tile by tile from the row statistics: max and sum, which the forward stored, and delta. lse would not
// do: where scores are large, its rounding is a factor of P.
//
// kernel            grid -> owns                        computes
// prepare_rows      lanes -> query                      delta = sum(doutput * output) - dlse, statistics, dsink per row
// backward_keys     block -> tile of keys, 1 key head   dkey = dS^T @ query, dvalue = P^T @ doutput, [dquery]
// backward_queries  block -> tile of queries            dquery = dS @ key, [each row's gradient of the ALiBi slope]
// round_dquery      lanes -> query                      dquery from the accumulator that backward_keys has filled
// backward_bias     block -> tile of dbias              the sum of dS over the dimensions that bias is broadcast along
// reduce_heads      block -> head                       gradients of sinks and slopes
//
// backward_keys and backward_queries each recompute the scores. That costs 7 products instead of 5, but no sum crosses
// blocks: no atomics, no partial sums in memory, the same bits on every run. With deterministic=False backward_keys
// also adds dquery to an fp32 accumulator by atomics, and round_dquery replaces backward_queries.
//
// In both kernels a block keeps the tiles of its own rows in shared memory and streams those of the other rows through
// it by cp.async. Dao: FlashAttention-2, arXiv:2307.08691.
#pragma once

#include "cuda/attention/dropout.cuh"
#include "cuda/attention/schedule.cuh"

namespace torchweld::cuda::attention {

struct Backward : AttentionBackwardParams {
  Schedule schedule;  // of the kernel that is launched
  float scale_log2;   // scale_log2_of(): a constant costs the loops no register
  bool vectorized;    // the rows of every input begin on 16 bytes
  bool pairs;         // the rows of every gradient begin on two elements
  // [B, H, Nq] (max, log2_sum): P = exp2((score - max) * scale_log2 - log2_sum). log2_sum is inf where all
  // probabilities of the row are 0.
  float2* softmax_statistics;
  // [B, H, Nq] (factor, delta): dS = P * (factor * dP - delta). The factor is 1. In a row whose only probability is 1
  // it is 0, and delta is -dlse: there dP and delta are the same number up to rounding.
  float2* gradient_statistics;
  float* row_dslopes;         // [B, H, Nq] sum over keys of dS * -|i + shift - j|; nullptr: not wanted
  float* row_dsinks;          // [B, H, Nq] gradient of the sink; nullptr: not wanted
  float* dquery_accumulator;  // [B, H, Nq, accumulator_width()]; nullptr: backward_queries computes dquery

  // A row of dquery_accumulator begins on two floats.
  TW_HOST_DEVICE int64_t accumulator_width() const { return (dim + 1) / 2 * 2; }
};

// True if backward_keys also accumulates dquery by atomics. Not for float32, whose tiles leave no shared memory for
// dS, nor with slope gradients, which need backward_queries anyway.
inline bool uses_atomic_dquery(const AttentionBackwardParams& p) {
  return !p.deterministic && p.dtype != DType::float32 && p.dquery != nullptr &&
         (p.dkey != nullptr || p.dvalue != nullptr) && p.dalibi_slopes == nullptr;
}

template <class T>
bool reads_vectorized(const Backward& p) {
  return rows_aligned(16, sizeof(T), {p.query, p.key, p.value, p.doutput},
                      {p.query_strides, p.key_strides, p.value_strides, p.doutput_strides});
}
template <class T>
bool writes_pairs(const Backward& p) {
  return rows_aligned(2 * sizeof(T), sizeof(T), {p.dquery, p.dkey, p.dvalue},
                      {p.dquery_strides, p.dkey_strides, p.dvalue_strides});
}

// dP to the factor of P in dS, with dropout applied first. gradient(m, n, e) gives the query's (factor, delta).
template <bool kTransposed, int MT, int NT, class Gradient>
__device__ __forceinline__ void subtract_delta(const Backward& p, float (&ds)[MT][NT][4], bool uses_dropout,
                                               const DropoutMask<kTransposed, MT, NT>& keep, Gradient&& gradient) {
  for_each<MT, NT>([&](int m, int n, int e) {
    if (uses_dropout) ds[m][n][e] = keep(m, n, e) ? ds[m][n][e] * p.dropout.scale : 0.0f;
    const float2 of = gradient(m, n, e);
    ds[m][n][e] = __fmaf_rn(ds[m][n][e], of.x, -of.y);
  });
}

// Scores to probabilities, in place. softmax(m, n, e) gives the query's (max, log2_sum).
template <int MT, int NT, class RowSoftmax>
__device__ __forceinline__ void recompute_probabilities(float (&s)[MT][NT][4], float scale_log2, RowSoftmax&& softmax) {
  for_each<MT, NT>([&](int m, int n, int e) {
    const float2 of = softmax(m, n, e);
    s[m][n][e] = ptx::exp2(__fmaf_rn(s[m][n][e] - of.x, scale_log2, -of.y));
  });
}

// The statistics of the query of column 2t (even e) or 2t + 1 (odd e) of an accumulator, read from shared memory.
__device__ __forceinline__ float2 column_statistics(uint32_t columns, int n, int e) {
  const float4 both = ptx::load_shared_floats(columns + n * 8 * sizeof(float2));
  return e % 2 == 0 ? make_float2(both.x, both.y) : make_float2(both.z, both.w);
}

// The rows of one head in the four tensors that the backward reads.
template <class T>
struct BackwardRows {
  Rows<T> query, doutput, key, value;

  // Keys and values: rows [begin, end).
  __device__ __forceinline__ BackwardRows(const Backward& p, const Head& head, int begin, int end)
      : query(head.all_queries<T>(p.query, p.query_strides, p.dim, p.vectorized)),
        doutput(head.all_queries<T>(p.doutput, p.doutput_strides, p.value_dim, p.vectorized)),
        key(head.keys_from<T>(p.key, p.key_strides, p.dim, begin, end, p.vectorized)),
        value(head.keys_from<T>(p.value, p.value_strides, p.value_dim, begin, end, p.vectorized)) {}
};

}  // namespace torchweld::cuda::attention
