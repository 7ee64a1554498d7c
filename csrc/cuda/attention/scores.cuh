// The head and rows of a block, the keys that a query sees, and the way from products query @ key^T to scores.
#pragma once

#include "cuda/attention/tile.cuh"
#include "params/attention.h"

namespace torchweld::cuda::attention {

constexpr int kMaxRows = 1 << 29;               // most queries or keys of a sequence
constexpr int kUnboundedOffset = 2 * kMaxRows;  // beyond every distance of query and key; sums with it fit an int

// Head h of batch, or packed sequence, b.
struct Head {
  int b, h, kv, queries, keys, shift;
  int low_offset, high_offset;     // query i sees keys i + low_offset to i + high_offset
  int64_t first_query, first_key;  // of a packed sequence, else 0
  int64_t statistics_begin;        // query 0 in the row statistics [B, H, Nq]
  int64_t mask_begin;              // query 0 in the rows of the dropout mask

  __device__ __forceinline__ Head(const AttentionInputs& p, int b, int h) : Head(p, b, h, static_cast<int>(p.keys)) {}

  // keys_here: the number of keys, unless packed.
  __device__ __forceinline__ Head(const AttentionInputs& p, int b, int h, int keys_here)
      : b(b), h(h), kv(h / static_cast<int>(p.heads / p.kv_heads)) {
    first_query = first_key = 0;
    queries = static_cast<int>(p.queries);
    keys = keys_here;
    statistics_begin = p.row(b, h);
    mask_begin = p.mask_row(b, h);
    if (p.cu_seqlens_q != nullptr) {
      extent(p.cu_seqlens_q + b, p.total_q, first_query, queries);
      extent(p.cu_seqlens_k + b, p.total_k, first_key, keys);
      statistics_begin = p.row(0, h) + first_query;
      mask_begin = p.mask_row(0, h) + first_query;
    }
    shift = bounded((p.bottom_right ? keys - queries : 0) + p.offset);
    low_offset = bounded(shift - p.left);
    high_offset = bounded(shift + p.right);
  }

  // Query i sees keys [key_begin(i), key_end(i)). Both grow with i. Empty where key_end <= key_begin.
  __device__ __forceinline__ int key_begin(int i) const { return clamp(i + low_offset, 0, keys); }
  __device__ __forceinline__ int key_end(int i) const { return clamp(i + high_offset + 1, 0, keys); }
  // Keys [begin, end) are seen by queries [query_begin(begin), query_end(end)) only.
  __device__ __forceinline__ int query_begin(int j) const { return clamp(j - high_offset, 0, queries); }
  __device__ __forceinline__ int query_end(int j) const { return clamp(j - low_offset, 0, queries); }

  struct Span {
    int begin, end;
  };
  // The keys that query i sees, and the queries that see key j. Empty where the query or key does not exist.
  __device__ __forceinline__ Span visible_keys(int i) const { return {key_begin(i), i < queries ? key_end(i) : 0}; }
  __device__ __forceinline__ Span visible_queries(int j) const {
    return {query_begin(j), j < keys ? query_end(j + 1) : 0};
  }

  // True if all queries [i, i + rows) see all keys [j, j + columns).
  __device__ __forceinline__ bool all_visible(int i, int rows, int j, int columns) const {
    return j >= i + rows - 1 + low_offset && j + columns - 1 <= i + high_offset && j + columns <= keys &&
           i + rows <= queries;
  }

  template <class T>
  __device__ __forceinline__ T* query_rows(T* base, const Strides& s) const {
    return base + b * s.batch + h * s.head + first_query * s.row;
  }
  template <class T>
  __device__ __forceinline__ T* key_rows(T* base, const Strides& s) const {
    return base + b * s.batch + kv * s.head + first_key * s.row;
  }

  // Rows to load: every row of query or doutput, rows [begin, end) of key or value.
  template <class T>
  __device__ __forceinline__ Rows<T> all_queries(const void* base, const Strides& s, int64_t size,
                                                 bool vectorized) const {
    return {query_rows(static_cast<const T*>(base), s), s.row, 0, queries, static_cast<int>(size), vectorized};
  }
  template <class T>
  __device__ __forceinline__ Rows<T> keys_from(const void* base, const Strides& s, int64_t size, int begin, int end,
                                               bool vectorized) const {
    return {key_rows(static_cast<const T*>(base), s), s.row, begin, end, static_cast<int>(size), vectorized};
  }

 private:
  // The rows of a packed sequence. They stay inside the tensor, whatever cu_seqlens says.
  static __device__ __forceinline__ void extent(const int32_t* starts, int64_t total, int64_t& first, int& rows) {
    const int most = static_cast<int>(total), begin = clamp(starts[0], 0, most);
    first = begin;
    rows = clamp(starts[1], begin, most) - begin;
  }

  static __device__ __forceinline__ int bounded(int64_t x) {
    return static_cast<int>(x < -kUnboundedOffset ? -kUnboundedOffset : x > kUnboundedOffset ? kUnboundedOffset : x);
  }
};

// The keys that `rows` queries from i0 on see: [begin, end), in `steps` tiles of kTile keys from `start` on.
template <int kTile>
struct VisibleKeys {
  int begin, end, start, steps;

  __device__ __forceinline__ VisibleKeys(const Head& head, int i0, int rows) {
    const int last = (i0 + rows < head.queries ? i0 + rows : head.queries) - 1;
    begin = head.key_begin(i0), end = head.key_end(last), start = begin / kTile * kTile;
    steps = begin < end ? (end - start + kTile - 1) / kTile : 0;
  }
};

// The query and key of each element of an accumulator. Rows from `row` on are queries of `of` and columns from `column`
// on are keys; with kTransposed rows are keys and columns are queries.
template <bool kTransposed_>
struct ScorePositions {
  static constexpr bool kTransposed = kTransposed_;
  const Head& of;
  int row, column;

  __device__ __forceinline__ const Head& head(int, int) const { return of; }
  __device__ __forceinline__ int query(int m, int n, int e) const {
    return kTransposed ? column_of(n, e) : row_of(m, e);
  }
  __device__ __forceinline__ int key(int m, int n, int e) const { return kTransposed ? row_of(m, e) : column_of(n, e); }
  // The columns that a row sees, or is seen by, counted from this lane's first column.
  __device__ __forceinline__ Head::Span span(int m, int e) const {
    const Head::Span all = kTransposed ? of.visible_queries(row_of(m, e)) : of.visible_keys(row_of(m, e));
    return {all.begin - column_of(0, 0), all.end - column_of(0, 0)};
  }

 private:
  __device__ __forceinline__ int row_of(int m, int e) const { return row + 16 * m + lane_row() + e / 2 * 8; }
  __device__ __forceinline__ int column_of(int n, int e) const { return column + 8 * n + lane_column() + e % 2; }
};

// Calls f(m, n, e) for every element of an accumulator.
template <int MT, int NT, class F>
__device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(m, n, e);
}

// A plain call: scores are products times a positive scale (one that fits a float after the factor log2(e)), and there
// is no dropout. Plain calls have kernels of their own.
__host__ __device__ inline bool is_plain(const AttentionInputs& p) {
  return p.scale > 1e-30f && p.scale < 1e30f && p.softcap == 0 && p.bias_type == MaskType::none &&
         p.alibi_slopes == nullptr && p.dropout.seed == nullptr;
}

// Kernels keep products (plain) or what modify_scores() returns. The score is score_scale times that number, and
// exp(score) is exp2(scale_log2 times that number).
__host__ __device__ inline float score_scale_of(const AttentionInputs& p, bool plain) { return plain ? p.scale : 1.0f; }
__host__ __device__ inline float scale_log2_of(const AttentionInputs& p, bool plain) {
  return score_scale_of(p, plain) * kLog2e;
}

// Two neighbouring elements of a bias. Of a boolean mask: not 0 if the key may be attended to.
template <class T>
__device__ __forceinline__ float2 bias_pair(const T* at) {
  if constexpr (sizeof(T) == 4) {
    return __ldg(reinterpret_cast<const float2*>(at));
  } else if constexpr (sizeof(T) == 2) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(at));
    return make_float2(unpack<T>(word, 0), unpack<T>(word, 1));
  } else {
    const uint16_t word = __ldg(reinterpret_cast<const uint16_t*>(at));
    return make_float2(word & 0xff, word >> 8);
  }
}
template <class T>
__device__ __forceinline__ float bias_element(const T* at) {
  if constexpr (sizeof(T) == 1) {
    return __ldg(at);
  } else {
    Vector<T, 1> one;
    one.load(at);
    return one[0];
  }
}

// unmasked: every position is an existing query and a visible key. Other positions are masked later, whatever this
// adds to them.
template <class T, class ScorePositions, int MT, int NT>
__device__ __forceinline__ void add_bias(const AttentionInputs& p, const ScorePositions& positions, bool unmasked,
                                         float (&s)[MT][NT][4]) {
  auto add = [](float& score, float bias) {
    if constexpr (sizeof(T) == 1)
      score = bias == 0.0f ? -infinity() : score;  // replaces NaN too
    else
      score += bias;
  };
  const T* base = static_cast<const T*>(p.bias);
  const Strides& strides = p.bias_strides;
  const int64_t next = ScorePositions::kTransposed ? strides.row : p.bias_step;  // from one column to the next
  const auto bits = reinterpret_cast<uintptr_t>(base) | (strides.batch | strides.head | strides.row) * sizeof(T);
  const bool pairs = unmasked && !ScorePositions::kTransposed && next == 1 && bits % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const Head& head = positions.head(m, e);
      const int i = positions.query(m, 0, e), j = positions.key(m, 0, e);
      const T* row = base + head.b * strides.batch + head.h * strides.head + i * strides.row + j * p.bias_step;
      if (pairs) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float2 bias = bias_pair(row + 8 * n);
          add(s[m][n][e], bias.x);
          add(s[m][n][e + 1], bias.y);
        }
      } else {
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (unmasked || (positions.query(m, n, e + c) < head.queries && positions.key(m, n, e + c) < head.keys))
              add(s[m][n][e + c], bias_element(row + (8 * n + c) * next));
      }
    }
}

// The roundings below are explicit: a score must have the same bits in the forward and in the backward, which subtracts
// the forward's maximum. Otherwise the compiler would fuse products with sums in one of them only.

// tanh with an error of about 1e-7, which is that of a score beside its softcap: one exponential, one reciprocal.
__device__ __forceinline__ float tanh_of(float x) {
  return __fmaf_rn(-2.0f, ptx::reciprocal(1.0f + ptx::exp2(2.0f * kLog2e * x)), 1.0f);
}

// Products to scores; `unmasked` as above. `capped`: also multiplies ds by the derivative of the softcap, so that it
// becomes the gradient of the product. ds is passed as an array: a pointer chosen at run time would move it from
// registers to local memory.
template <class ScorePositions, int MT, int NT>
__device__ __forceinline__ void modify_scores(const AttentionInputs& p, const ScorePositions& positions, bool unmasked,
                                              float (&s)[MT][NT][4], float (*ds)[NT][4] = nullptr, bool capped = true) {
  const float softcap = p.softcap, inverse = softcap != 0 ? p.scale / softcap : p.scale;
  for_each<MT, NT>([&](int m, int n, int e) { s[m][n][e] = __fmul_rn(s[m][n][e], inverse); });
  if (softcap != 0)
    for_each<MT, NT>([&](int m, int n, int e) {
      const float t = tanh_of(s[m][n][e]);
      s[m][n][e] = __fmul_rn(softcap, t);
      if (ds != nullptr && capped) ds[m][n][e] *= 1.0f - t * t;
    });
  switch (p.bias_type) {
    case MaskType::none:
      break;
    case MaskType::boolean:
      add_bias<uint8_t>(p, positions, unmasked, s);
      break;
    case MaskType::float32:
      add_bias<float>(p, positions, unmasked, s);
      break;
    case MaskType::bfloat16:
      add_bias<__nv_bfloat16>(p, positions, unmasked, s);
      break;
    case MaskType::float16:
      add_bias<__half>(p, positions, unmasked, s);
      break;
  }
  if (p.alibi_slopes != nullptr)
    for_each<MT, NT>([&](int m, int n, int e) {
      const Head& head = positions.head(m, e);
      const int distance = positions.query(m, n, e) + head.shift - positions.key(m, n, e);
      const float slope = p.alibi_slopes[head.b * p.alibi_batch_stride + head.h];
      s[m][n][e] = __fmaf_rn(-slope, fabsf(static_cast<float>(distance)), s[m][n][e]);
    });
}

// Writes `value` at every position whose query does not see its key.
template <class ScorePositions, int MT, int NT>
__device__ __forceinline__ void mask_out(const ScorePositions& positions, float (&s)[MT][NT][4], float value) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const Head::Span span = positions.span(m, e);
      const auto width = static_cast<unsigned>(span.end > span.begin ? span.end - span.begin : 0);
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (static_cast<unsigned>(8 * n + c - span.begin) >= width) s[m][n][e + c] = value;
    }
}

}  // namespace torchweld::cuda::attention
