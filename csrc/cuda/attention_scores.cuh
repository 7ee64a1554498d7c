// What every attention kernel shares: which head and rows a block has, which keys a query sees, and how products
// query @ key^T become scores.
#pragma once

#include "cuda/attention_tile.cuh"

namespace torchweld::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kRowLimit = 1 << 30;  // rows and keys of a sequence: sums of two row numbers fit an int

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// Head h of batch (or packed sequence) b.
struct Head {
  int b, h, kv, queries, keys, shift;
  int low_offset, high_offset;      // query i sees keys i + low_offset to i + high_offset
  int64_t first_query, first_key;   // of a packed sequence, else 0
  int64_t values;                   // where its row 0 is in what has one value per row, [B, H, Nq]; also the dropout's row

  __device__ __forceinline__ Head(const AttentionInputs& p, int b, int h)
      : b(b), h(h), kv(h / static_cast<int>(p.heads / p.kv_heads)) {
    queries = static_cast<int>(p.queries);
    keys = static_cast<int>(p.keys);
    first_query = first_key = 0;
    values = (static_cast<int64_t>(b) * p.heads + h) * p.queries;
    shift = static_cast<int>(p.shift);
    low_offset = bounded(shift - p.left);
    high_offset = bounded(shift + p.right);
  }

  // Query i sees keys [low(i), high(i)); both grow with i. Empty where high <= low.
  __device__ __forceinline__ int low(int i) const { return clamp(i + low_offset, 0, keys); }
  __device__ __forceinline__ int high(int i) const { return clamp(i + high_offset + 1, 0, keys); }
  // Keys [begin, end) are seen by queries [first(begin), last(end)) and by no others.
  __device__ __forceinline__ int first(int begin) const { return clamp(begin - high_offset, 0, queries); }
  __device__ __forceinline__ int last(int end) const { return clamp(end - low_offset, 0, queries); }

  __device__ __forceinline__ bool sees(int i, int j) const {
    return static_cast<unsigned>(j - i - low_offset) <= static_cast<unsigned>(high_offset - low_offset) && j < keys && i < queries;
  }

  // Whether queries [i, i + rows) all see keys [j, j + columns).
  __device__ __forceinline__ bool sees_all(int i, int rows, int j, int columns) const {
    return j >= i + rows - 1 + low_offset && j + columns - 1 <= i + high_offset && j + columns <= keys && i + rows <= queries;
  }

  template <class T>
  __device__ __forceinline__ T* query_rows(T* base, const Strides& s) const {
    return base + b * s.batch + h * s.head + first_query * s.row;
  }
  template <class T>
  __device__ __forceinline__ T* key_rows(T* base, const Strides& s) const {
    return base + b * s.batch + kv * s.head + first_key * s.row;
  }

 private:
  static __device__ __forceinline__ int bounded(int64_t x) {
    return static_cast<int>(x < -kRowLimit ? -kRowLimit : x > kRowLimit ? kRowLimit : x);
  }
};

// f(m, n, e, i, j) for every element of an accumulator whose first row and column are (row, column): query i, key j. Of a
// transposed one the rows are keys.
template <bool kTransposed, int MT, int NT, class F>
__device__ __forceinline__ void for_each(int row, int column, F&& f) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = row + 16 * m + lane_row() + e / 2 * 8, c = column + 8 * n + lane_column() + e % 2;
        f(m, n, e, kTransposed ? c : r, kTransposed ? r : c);
      }
}

// Whether scores are products times a positive scale, and nothing else.
__host__ __device__ inline bool is_plain(const AttentionInputs& p) {
  return p.scale > 0 && p.softcap == 0 && p.bias_type == MaskType::none && p.alibi_slopes == nullptr;
}

// exp(score) is exp2(unit * what `modify` leaves).
__device__ __forceinline__ float unit_of(const AttentionInputs& p) { return is_plain(p) ? p.scale * kLog2e : kLog2e; }

template <class T, bool kTransposed, int MT, int NT>
__device__ __forceinline__ void add_bias(const AttentionInputs& p, const Head& head, float (&s)[MT][NT][4], int row, int column) {
  const T* bias = static_cast<const T*>(p.bias) + head.b * p.bias_strides.batch + head.h * p.bias_strides.head;
  for_each<kTransposed, MT, NT>(row, column, [&](int m, int n, int e, int i, int j) {
    if (i >= head.queries || j >= head.keys) return;
    const T* at = bias + i * p.bias_strides.row + j * p.bias_step;
    if constexpr (sizeof(T) == 1) {
      if (__ldg(at) == 0) s[m][n][e] = -infinity();
    } else {
      Run<T, 1> one;
      one.load(at);
      s[m][n][e] += one[0];
    }
  });
}

// Products to scores. ds, of the same layout: multiplied by the softcap's derivative, where there is one; nullptr: not.
template <bool kTransposed, int MT, int NT>
__device__ __forceinline__ void modify(const AttentionInputs& p, const Head& head, float (&s)[MT][NT][4], int row, int column,
                                       float (*ds)[NT][4] = nullptr) {
  if (is_plain(p)) return;
  const float softcap = p.softcap, inverse = softcap != 0 ? p.scale / softcap : p.scale;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[m][n][e] *= inverse;
  if (softcap != 0) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float t = tanhf(s[m][n][e]);
          s[m][n][e] = softcap * t;
          if (ds != nullptr) ds[m][n][e] *= 1.0f - t * t;
        }
  }
  switch (p.bias_type) {
    case MaskType::none: break;
    case MaskType::boolean: add_bias<uint8_t, kTransposed>(p, head, s, row, column); break;
    case MaskType::float32: add_bias<float, kTransposed>(p, head, s, row, column); break;
    case MaskType::bfloat16: add_bias<__nv_bfloat16, kTransposed>(p, head, s, row, column); break;
    case MaskType::float16: add_bias<__half, kTransposed>(p, head, s, row, column); break;
  }
  if (p.alibi_slopes != nullptr) {
    const float slope = p.alibi_slopes[head.b * p.alibi_batch_stride + head.h];
    for_each<kTransposed, MT, NT>(row, column, [&](int m, int n, int e, int i, int j) {
      s[m][n][e] -= slope * fabsf(static_cast<float>(i + head.shift - j));
    });
  }
}

// -inf to scores whose query does not see the key, 0 to their ds (nullptr: none).
template <bool kTransposed, int MT, int NT>
__device__ __forceinline__ void hide(const Head& head, float (&s)[MT][NT][4], int row, int column, float (*ds)[NT][4] = nullptr) {
  for_each<kTransposed, MT, NT>(row, column, [&](int m, int n, int e, int i, int j) {
    if (head.sees(i, j)) return;
    s[m][n][e] = -infinity();
    if (ds != nullptr) ds[m][n][e] = 0.0f;
  });
}

}  // namespace torchweld::cuda
