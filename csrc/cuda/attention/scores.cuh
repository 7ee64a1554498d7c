// What every attention kernel shares: which head and rows a block has, which keys a query sees, and how products
// query @ key^T become scores.
#pragma once

#include "cuda/attention/tile.cuh"

namespace torchweld::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kRowLimit = 1 << 29;      // queries and keys of a sequence
constexpr int kUnseen = 2 * kRowLimit;  // a distance that none of them have; sums with it fit an int

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

// A row's maximum as something to subtract: -inf - -inf would be NaN.
__device__ __forceinline__ float finite(float max) { return max == -infinity() ? 0.0f : max; }

// Head h of batch (or packed sequence) b.
struct Head {
  int b, h, kv, queries, keys, shift;
  int low_offset, high_offset;     // query i sees keys i + low_offset to i + high_offset
  int64_t first_query, first_key;  // of a packed sequence, else 0
  int64_t values;  // where its row 0 is in what has one value per row, [B, H, Nq]; also the dropout's row

  __device__ __forceinline__ Head(const AttentionInputs& p, int b, int h) : Head(p, b, h, static_cast<int>(p.keys)) {}

  // With so many keys, if not packed.
  __device__ __forceinline__ Head(const AttentionInputs& p, int b, int h, int keys_here)
      : b(b), h(h), kv(h / static_cast<int>(p.heads / p.kv_heads)) {
    first_query = first_key = 0;
    queries = static_cast<int>(p.queries);
    keys = keys_here;
    values = p.row(b, h);
    if (p.cu_seqlens_q != nullptr) {
      extent(p.cu_seqlens_q + b, p.total_q, first_query, queries);
      extent(p.cu_seqlens_k + b, p.total_k, first_key, keys);
      values = p.row(0, h) + first_query;
    }
    shift = p.bottom_right ? keys - queries : 0;
    low_offset = bounded(shift - p.left);
    high_offset = bounded(shift + p.right);
  }

  // Query i sees keys [low(i), high(i)); both grow with i. Empty where high <= low.
  __device__ __forceinline__ int low(int i) const { return clamp(i + low_offset, 0, keys); }
  __device__ __forceinline__ int high(int i) const { return clamp(i + high_offset + 1, 0, keys); }
  // Keys [begin, end) are seen by queries [first(begin), last(end)) and by no others.
  __device__ __forceinline__ int first(int begin) const { return clamp(begin - high_offset, 0, queries); }
  __device__ __forceinline__ int last(int end) const { return clamp(end - low_offset, 0, queries); }

  struct Span {
    int begin, end;
  };
  // The keys that query i sees, the queries that see key j; none where there is no such query or key.
  __device__ __forceinline__ Span keys_of(int i) const { return {low(i), i < queries ? high(i) : 0}; }
  __device__ __forceinline__ Span queries_of(int j) const { return {first(j), j < keys ? last(j + 1) : 0}; }

  // Whether queries [i, i + rows) all see keys [j, j + columns).
  __device__ __forceinline__ bool sees_all(int i, int rows, int j, int columns) const {
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

  // Of queries or their gradients all, of keys or values those from `begin` to `end`.
  template <class T>
  __device__ __forceinline__ Rows<T> all_queries(const void* base, const Strides& s, int64_t size, bool packets) const {
    return {query_rows(static_cast<const T*>(base), s), s.row, 0, queries, static_cast<int>(size), packets};
  }
  template <class T>
  __device__ __forceinline__ Rows<T> keys_from(const void* base, const Strides& s, int64_t size, int begin, int end,
                                               bool packets) const {
    return {key_rows(static_cast<const T*>(base), s), s.row, begin, end, static_cast<int>(size), packets};
  }

 private:
  // Of a packed sequence; whatever its starts say, it stays inside the tensor.
  static __device__ __forceinline__ void extent(const int32_t* starts, int64_t total, int64_t& first, int& rows) {
    const int most = static_cast<int>(total), begin = clamp(starts[0], 0, most);
    first = begin;
    rows = clamp(starts[1], begin, most) - begin;
  }

  static __device__ __forceinline__ int bounded(int64_t x) {
    return static_cast<int>(x < -kUnseen ? -kUnseen : x > kUnseen ? kUnseen : x);
  }
};

// What `rows` queries from i0 on see: keys [begin, end), which are in `steps` tiles of kTile from `start` on.
template <int kTile>
struct SeenKeys {
  int begin, end, start, steps;

  __device__ __forceinline__ SeenKeys(const Head& head, int i0, int rows) {
    const int last = (i0 + rows < head.queries ? i0 + rows : head.queries) - 1;
    begin = head.low(i0), end = head.high(last), start = begin / kTile * kTile;
    steps = begin < end ? (end - start + kTile - 1) / kTile : 0;
  }
};

// Whose scores the elements of an accumulator are: its rows from `row` on are queries of `head`, its columns from
// `column` on are keys; of a transposed one the rows are keys.
template <bool kTransposed_>
struct Cells {
  static constexpr bool kTransposed = kTransposed_;
  const Head& of;
  int row, column;

  __device__ __forceinline__ const Head& head(int, int) const { return of; }
  __device__ __forceinline__ int query(int m, int n, int e) const {
    return kTransposed ? column_of(n, e) : row_of(m, e);
  }
  __device__ __forceinline__ int key(int m, int n, int e) const { return kTransposed ? row_of(m, e) : column_of(n, e); }
  // What a row sees, or is seen by; counted from this lane's first column.
  __device__ __forceinline__ Head::Span span(int m, int e) const {
    const Head::Span all = kTransposed ? of.queries_of(row_of(m, e)) : of.keys_of(row_of(m, e));
    return {all.begin - column_of(0, 0), all.end - column_of(0, 0)};
  }

 private:
  __device__ __forceinline__ int row_of(int m, int e) const { return row + 16 * m + lane_row() + e / 2 * 8; }
  __device__ __forceinline__ int column_of(int n, int e) const { return column + 8 * n + lane_column() + e % 2; }
};

// f(m, n, e) for every element of an accumulator.
template <int MT, int NT, class F>
__device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) f(m, n, e);
}

// Whether scores are products times a positive scale (one that a float can bear when log2(e) is multiplied to it) and
// nothing else, and no weight is dropped: what has a kernel of its own.
__host__ __device__ inline bool is_plain(const AttentionInputs& p) {
  return p.scale > 1e-30f && p.scale < 1e30f && p.softcap == 0 && p.bias_type == MaskType::none &&
         p.alibi_slopes == nullptr && p.dropout.seed == nullptr;
}

// Scores are kept as they are where the weights are made: as products, or as what `modify` made of them. exp(score) is
// exp2(unit * that), and the score itself natural * that.
__host__ __device__ inline float natural_of(const AttentionInputs& p, bool plain) { return plain ? p.scale : 1.0f; }
__host__ __device__ inline float unit_of(const AttentionInputs& p, bool plain) { return natural_of(p, plain) * kLog2e; }

// Two neighbouring elements of a bias; of a mask, whether they may be attended to.
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
    Run<T, 1> one;
    one.load(at);
    return one[0];
  }
}

// `whole`: all cells are of queries and keys that exist. What is not is hidden later, whatever is added here.
template <class T, class Cells, int MT, int NT>
__device__ __forceinline__ void add_bias(const AttentionInputs& p, const Cells& cells, bool whole,
                                         float (&s)[MT][NT][4]) {
  auto add = [](float& score, float bias) {
    if constexpr (sizeof(T) == 1)
      score = bias == 0.0f ? -infinity() : score;  // whatever it is, NaN too
    else
      score += bias;
  };
  const T* base = static_cast<const T*>(p.bias);
  const Strides& strides = p.bias_strides;
  const int64_t next = Cells::kTransposed ? strides.row : p.bias_step;  // to the next column
  const auto bits = reinterpret_cast<uintptr_t>(base) | (strides.batch | strides.head | strides.row) * sizeof(T);
  const bool pairs = whole && !Cells::kTransposed && next == 1 && bits % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const Head& head = cells.head(m, e);
      const int i = cells.query(m, 0, e), j = cells.key(m, 0, e);
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
            if (whole || (cells.query(m, n, e + c) < head.queries && cells.key(m, n, e + c) < head.keys))
              add(s[m][n][e + c], bias_element(row + (8 * n + c) * next));
      }
    }
}

// What follows says where it rounds: scores must have the same bits in the forward and in the backward, which subtracts
// the forward's maximum, and the compiler would fuse products with sums in one of them and not in the other.

// tanh to about 1e-7, for one exponential and one reciprocal: scores are as exact beside their cap.
__device__ __forceinline__ float tanh_of(float x) {
  return __fmaf_rn(-2.0f, ptx::reciprocal(1.0f + ptx::exp2(2.0f * kLog2e * x)), 1.0f);
}

// Products to scores; `whole` as above. ds, of the same layout, is multiplied by the softcap's derivative if it is to
// be that of the products (`capped`). An array is passed where it is, never behind a pointer chosen at run time: it
// would leave the registers.
template <class Cells, int MT, int NT>
__device__ __forceinline__ void modify(const AttentionInputs& p, const Cells& cells, bool whole, float (&s)[MT][NT][4],
                                       float (*ds)[NT][4] = nullptr, bool capped = true) {
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
      add_bias<uint8_t>(p, cells, whole, s);
      break;
    case MaskType::float32:
      add_bias<float>(p, cells, whole, s);
      break;
    case MaskType::bfloat16:
      add_bias<__nv_bfloat16>(p, cells, whole, s);
      break;
    case MaskType::float16:
      add_bias<__half>(p, cells, whole, s);
      break;
  }
  if (p.alibi_slopes != nullptr)
    for_each<MT, NT>([&](int m, int n, int e) {
      const Head& head = cells.head(m, e);
      const int distance = cells.query(m, n, e) + head.shift - cells.key(m, n, e);
      const float slope = p.alibi_slopes[head.b * p.alibi_batch_stride + head.h];
      s[m][n][e] = __fmaf_rn(-slope, fabsf(static_cast<float>(distance)), s[m][n][e]);
    });
}

// `value` in place of what belongs to a query that does not see the key.
template <class Cells, int MT, int NT>
__device__ __forceinline__ void hide(const Cells& cells, float (&s)[MT][NT][4], float value) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const Head::Span span = cells.span(m, e);
      const auto width = static_cast<unsigned>(span.end > span.begin ? span.end - span.begin : 0);
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (static_cast<unsigned>(8 * n + c - span.begin) >= width) s[m][n][e + c] = value;
    }
}

}  // namespace torchweld::cuda
