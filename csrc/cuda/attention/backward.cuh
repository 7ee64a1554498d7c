// Attention, backward: what its kernels share. cpu/attention/backward.cpp has the formulas; weights and their gradients
//
//   P = exp(scores - max) / sum        dP = dropout(doutput @ value^T)        dS = P * (dP - delta)
//
// are made again, tile by tile, from the forward's max and sum of each row and from delta. (lse would do for the first
// two if it were exact: where scores are large its rounding is a factor of P.) Every kernel has its own loop over them
// instead of sharing one, which costs 7 products in place of 5, but leaves nothing to be added across blocks: no
// atomics, no semaphores, no partial sums in memory, and the same bits on every run. Where that is not asked for, keys
// also adds its part to dquery, by atomics in fp32, and nobody makes the scores a second time.
//
//   prepare    warp -> query: delta = sum(doutput * output) - dlse, and what else is made of row values
//   keys       block -> tile of keys of one key head, transposed: dkey = dS^T @ query, dvalue = P^T @ doutput
//   queries    block -> tile of queries: dquery = dS @ key, and each row's share of the gradient of the ALiBi slope
//   round      warp -> query: dquery of what keys has added up, in place of queries
//   bias       block -> tile of dbias: the sum of dS over whatever bias is broadcast to
//   reduce     block -> head: gradients of sinks and slopes
//
// In keys and queries a block keeps the tiles of its own rows and streams those of the others through a ring by
// cp.async. Dao: FlashAttention-2, arXiv:2307.08691.
#pragma once

#include "cuda/attention/dropout.cuh"
#include "cuda/attention/products.cuh"
#include "cuda/attention/schedule.cuh"

namespace torchweld::cuda {

struct Backward : AttentionBackwardParams {
  Schedule schedule;  // of the kernel that is launched
  float unit;         // of scores as they are kept: see unit_of; a constant costs the loops no register
  bool packets;       // all rows that are read begin on 16 bytes
  bool pairs;         // all rows of gradients begin on two elements
  // [B, H, Nq] P = exp2((score - x) * unit - y): the maximum, or 0; log2 of the sum, inf where all weights are 0.
  float2* softmax;
  // [B, H, Nq] dS = P * (x * dP - y): 1 and delta, or, where one weight of 1 is all there is, 0 and -dlse: delta is dP
  // then, but for the rounding of either.
  float2* gradient;
  float* distances;      // [B, H, Nq] sum over keys of dS * -|i + shift - j|, nullptr: not wanted by the kernel that is
                         // launched
  float* sinks_of_rows;  // [B, H, Nq] the gradient of the sink, nullptr: not wanted
  float* dquery_sum;     // [B, H, Nq, sum_width()] what keys adds to, nullptr: queries makes dquery

  // A row of dquery_sum begins on two floats.
  TW_HOST_DEVICE int64_t sum_width() const { return (dim + 1) / 2 * 2; }
};

// Whether keys makes dquery too: not with floats, whose tiles leave no room in shared memory, nor where the gradient of
// the slopes needs the loop of queries anyway.
inline bool adds_up(const AttentionBackwardParams& p) {
  return !p.deterministic && p.dtype != DType::float32 && p.dquery != nullptr &&
         (p.dkey != nullptr || p.dvalue != nullptr) && p.dalibi_slopes == nullptr;
}

template <class T>
bool reads_packets(const Backward& p) {
  return rows_begin_on(16, sizeof(T), {p.query, p.key, p.value, p.doutput},
                       {p.query_strides, p.key_strides, p.value_strides, p.doutput_strides});
}
template <class T>
bool writes_pairs(const Backward& p) {
  return rows_begin_on(2 * sizeof(T), sizeof(T), {p.dquery, p.dkey, p.dvalue},
                       {p.dquery_strides, p.dkey_strides, p.dvalue_strides});
}

// A block of `kRows` own rows, 16 * MT to a warp, and tiles of `kOthers` streamed ones, kStages of them in flight. A
// block fits the 99 KB of shared memory of sm_86 and sm_89.
template <class T, int D, bool kPlain>
struct BackwardShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = kWide && D > 128 ? 2 : 4, kThreads = kWarps * kLanes;
  static constexpr int MT = kPlain && !kWide && D <= 64 ? 2 : 1;
  static constexpr int kRows = kWarps * MT * 16;
  static constexpr int kOthers = D <= 64 || (D <= 128 && !kWide) ? 32 : 16;
  static constexpr int kStages = kWide && D > 128 ? 1 : 2;
  static constexpr int kRowBytes = Tile<T, D>::kRowBytes;
  static constexpr int kStageBytes = kOthers * (2 * kRowBytes + 2 * static_cast<int>(sizeof(float2)));
  static constexpr int kBytes = 2 * kRows * kRowBytes + kStages * kStageBytes;
  static constexpr int kScoreBytes = kRows * kOthers * static_cast<int>(sizeof(T));  // of dS, where warps share it
  static_assert(kBytes + (kWide ? 0 : kScoreBytes) <= 99 * 1024);
};

// Shared memory: two tiles of own rows, then the stages, each of two tiles of other rows and their `softmax` and
// `gradient`, then dS.
template <class T, int D, bool kPlain>
struct BackwardMemory {
  using Shape = BackwardShape<T, D, kPlain>;
  uint32_t own[2], stages;

  __device__ __forceinline__ BackwardMemory() {
    own[0] = ptx::shared_base();
    own[1] = own[0] + Shape::kRows * Shape::kRowBytes;
    stages = own[1] + Shape::kRows * Shape::kRowBytes;
  }
  __device__ __forceinline__ uint32_t own_rows(int which) const {
    return own[which] + warp() * Shape::MT * 16 * Shape::kRowBytes;
  }
  __device__ __forceinline__ uint32_t others(int step, int which) const {
    return stages + step % Shape::kStages * Shape::kStageBytes + which * Shape::kOthers * Shape::kRowBytes;
  }
  __device__ __forceinline__ uint32_t scores() const { return stages + Shape::kStages * Shape::kStageBytes; }
  __device__ __forceinline__ uint32_t values(int step, int which) const {
    return others(step, 2) + which * Shape::kOthers * static_cast<int>(sizeof(float2));
  }

  // load(step) and multiply(step) for steps 0 to steps - 1, in order; what load copies for a step has landed, for all
  // threads, when it is multiplied. load may be asked for steps past the end.
  template <class Load, class Multiply>
  __device__ __forceinline__ void pipeline(int steps, Load&& load, Multiply&& multiply) const {
#pragma unroll
    for (int step = 0; step < Shape::kStages - 1; ++step) {
      load(step);
      ptx::cp_async_commit();
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (Shape::kStages == 1) {
        __syncthreads();
        load(step);
        ptx::cp_async_commit();
      }
      ptx::cp_async_wait<Shape::kStages == 1 ? 0 : Shape::kStages - 2>();
      __syncthreads();
      if (Shape::kStages > 1) {
        load(step + Shape::kStages - 1);
        ptx::cp_async_commit();
      }
      multiply(step);
    }
  }
};

// dP to what P is multiplied by, with dropout in between; gradient(m, n, e): of the query, as in Backward.
template <bool kTransposed, int MT, int NT, class Gradient>
__device__ __forceinline__ void subtract_delta(const Backward& p, float (&ds)[MT][NT][4], bool drops,
                                               const Kept<kTransposed, MT, NT>& kept, Gradient&& gradient) {
  for_each<MT, NT>([&](int m, int n, int e) {
    if (drops) ds[m][n][e] = kept(m, n, e) ? ds[m][n][e] * p.dropout.scale : 0.0f;
    const float2 of = gradient(m, n, e);
    ds[m][n][e] = __fmaf_rn(ds[m][n][e], of.x, -of.y);
  });
}

// Scores to weights, in place; softmax(m, n, e): of the query, as in Backward.
template <int MT, int NT, class RowSoftmax>
__device__ __forceinline__ void weigh(float (&s)[MT][NT][4], float unit, RowSoftmax&& softmax) {
  for_each<MT, NT>([&](int m, int n, int e) {
    const float2 of = softmax(m, n, e);
    s[m][n][e] = ptx::exp2(__fmaf_rn(s[m][n][e] - of.x, unit, -of.y));
  });
}

// Two row values of the query of column 2t of an accumulator, or of the next, from where they lie in shared memory.
__device__ __forceinline__ float2 column_values(uint32_t columns, int n, int e) {
  const float4 both = ptx::load_shared_floats(columns + n * 8 * sizeof(float2));
  return e % 2 == 0 ? make_float2(both.x, both.y) : make_float2(both.z, both.w);
}

// The rows of the four tensors that are read, of one head.
template <class T>
struct BackwardRows {
  Rows<T> query, doutput, key, value;

  // Of keys and values those from `begin` to `end`.
  __device__ __forceinline__ BackwardRows(const Backward& p, const Head& head, int begin, int end)
      : query(head.all_queries<T>(p.query, p.query_strides, p.dim, p.packets)),
        doutput(head.all_queries<T>(p.doutput, p.doutput_strides, p.value_dim, p.packets)),
        key(head.keys_from<T>(p.key, p.key_strides, p.dim, begin, end, p.packets)),
        value(head.keys_from<T>(p.value, p.value_strides, p.value_dim, begin, end, p.packets)) {}
};

}  // namespace torchweld::cuda
