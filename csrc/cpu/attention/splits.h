// What decoding and paged_attention are made of: attention of a few queries over one split of the keys of a key head,
// and the merge of the splits.
//
// A split is for all of the key head's rows (queries of every query head that shares it): it reads each key and value
// once, where they lie, and leaves maximum, sum and P @ value of each row. Splits are merged first to last; they depend
// on the number of keys alone, so results do not on the number of threads. Bound by memory: (D + Dv) elements per key
// and key head. Dao, Haziza, Massa, Sizov: Flash-Decoding, 2023.
#pragma once

#include "cpu/attention/sequences.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kSplitKeys = 256;
constexpr int64_t kMergeRows = 64;  // a task of the last pass

template <class T>
class Splits {
  using Compute = typename VectorComputeOf<T>::type;
  static constexpr bool kTiles = ComputeOf<T>::type::tiles && Compute::per_word == 2;
  using Params = AttentionForwardParams;

 public:
  explicit Splits(const Params& p, float* partials = nullptr)
      : rows(p.heads / p.kv_heads * p.queries),
        count(max_of(ceil_div(p.keys, kSplitKeys), 1)),
        p_(p),
        group_(p.heads / p.kv_heads),
        query_words_(round_up(ceil_div(p.dim, Compute::per_word), W)),
        width_(round_up(p.value_dim, W)),
        partials_(partials) {}

  const int64_t rows, count;  // of a key head, of splits

  // Words of each thread: the rows' queries and scores; with tiles, their queries transposed as well.
  int64_t scratch() const { return rows * (query_words_ + kSplitKeys) + (kTiles ? query_words_ * W : 0); }

  // Words of each key head and split: of each row P @ value, maximum and sum.
  int64_t own_words() const { return p_.batch * p_.kv_heads * count * rows * (width_ + W); }

  // The keys of a split, counted from its first, that any row sees: from a whole vector on.
  Span seen(int64_t split) const {
    const int64_t begin = split * kSplitKeys;
    const Band band(p_);
    return {round_down(max_of(band.low(0) - begin, 0), W),
            min_of(band.high(p_.queries - 1) - begin, min_of(kSplitKeys, p_.keys - begin))};
  }

  void attend(int64_t head, int64_t split, float* queries) const {
    const int64_t b = head / p_.kv_heads, hk = head % p_.kv_heads, begin = split * kSplitKeys;
    attend(head, split, queries, head_of<T>(p_.key, p_.key_strides, b, hk) + begin * p_.key_strides.row,
           head_of<T>(p_.value, p_.value_strides, b, hk) + begin * p_.value_strides.row);
  }

  // k, v: the first rows of the split.
  void attend(int64_t head, int64_t split, float* queries, const T* k, const T* v) const {
    const int64_t b = head / p_.kv_heads, begin = split * kSplitKeys;
    float* s = queries + rows * query_words_;
    for (int64_t r = 0; r < rows; ++r) {
      const T* q =
          head_of<T>(p_.query, p_.query_strides, b, query_head(head, r)) + r % p_.queries * p_.query_strides.row;
      for (int64_t d = 0; d < query_words_; d += W) store(queries + r * query_words_ + d, words(q, d, p_.dim));
    }

    // Products. Keys that no row sees are not read.
    const Span seen = this->seen(split);
    const int64_t done = multiply_by_tiles(k, seen, queries, s);
    for_rows([&](auto several, int64_t r) {
      multiply<decltype(several)::value>(k, {done, seen.end}, queries + r * query_words_, s + r * kSplitKeys);
    });

    for (int64_t r = 0; r < rows; ++r) {
      float *row = s + r * kSplitKeys, *out = partial(head, split, r);
      const Span span{seen.begin, max_of(round_up(seen.end, W), seen.begin)};
      const Scores scores(p_, b, query_head(head, r));
      scores.finish(row, r % p_.queries, begin, span, nullptr);

      // Softmax. P takes the place of the scores, in words.
      Vec largest = splat(-kInfinity), total{};
      for (int64_t j = span.begin; j < span.end; j += W) largest = vmax(load(row + j), largest);
      const float top = max_of(largest);
      const Vec subtract = splat(top == -kInfinity ? 0.0f : top), unit = splat(scores.unit());
      for (int64_t j = span.begin; j < span.end; j += W) {
        const Vec e = weight<5>(load(row + j), subtract, unit);
        total += e;
        Compute::store_row(row, j, e);
      }
      if (scores.dropout.active()) scores.dropout.template drop<Compute>(row, r % p_.queries, begin, span);
      out[width_] = top;
      out[width_ + 1] = sum(total);
    }

    // P @ value.
    for_rows([&](auto several, int64_t r) {
      add_values<decltype(several)::value>(s + r * kSplitKeys, seen, v, partial(head, split, r));
    });
  }

  // The output of row r of a key head, from all splits.
  void merge(int64_t head, int64_t r) const {
    const int64_t b = head / p_.kv_heads, h = query_head(head, r), i = r % p_.queries;
    float top = -kInfinity, total = 0.0f;
    for (int64_t n = 0; n < count; ++n) {
      const float other = partial(head, n, r)[width_];
      top = other > top ? other : top;
    }
    const float finite = top == -kInfinity ? 0.0f : top, unit = score_unit(p_) * kLog2e;
    for (int64_t n = 0; n < count; ++n) {
      float* split = partial(head, n, r);
      split[width_] = __builtin_exp2f((split[width_] - finite) * unit);
      total += split[width_ + 1] * split[width_];
    }
    const float* sink = p_.sinks != nullptr ? p_.sinks + h : nullptr;
    const Denominator denominator(splat(top), splat(total), score_unit(p_), sink);
    const Vec inverse = denominator.inverse * HeadDropout(p_, b, h).scale();
    T* out = head_of<T>(p_.output, p_.output_strides, b, h) + i * p_.output_strides.row;
    for_each_vector(p_.value_dim, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
      Vec value{};
      for (int64_t n = 0; n < count; ++n) value += load(partial(head, n, r) + d) * partial(head, n, r)[width_];
      store(out + d, value * inverse, lanes);
    });
    if (p_.lse != nullptr) p_.lse[p_.row(b, h) + i] = denominator.lse[0];
  }

 private:
  float* partial(int64_t head, int64_t split, int64_t row) const {
    return partials_ + ((head * count + split) * rows + row) * (width_ + W);
  }

  // Row r of a key head: query r % Nq of the query head that this returns.
  int64_t query_head(int64_t head, int64_t r) const { return head % p_.kv_heads * group_ + r / p_.queries; }

  // Words [d, d + W) of a row of `dim` elements.
  TW_INLINE static Vec words(const T* row, int64_t d, int64_t dim) {
    Vec v[1];
    load_words<T, Compute>(row, d, dim, v);
    return v[0];
  }

  template <int N>
  struct Count {
    static constexpr int value = N;
  };

  // Four at a time, then one by one.
  template <class Body>
  TW_INLINE void for_rows(Body&& body) const {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) body(Count<4>{}, r);
    for (; r < rows; ++r) body(Count<1>{}, r);
  }

  // Products of R rows with keys [keys.begin, keys.end).
  template <int R>
  void multiply(const T* k, Span keys, const float* queries, float* s) const {
    const int64_t stride = p_.key_strides.row, dim = p_.dim, steps = query_words_;
    for (int64_t j = keys.begin; j < keys.end; j += W) {
      Vec product[R][W];
      for (int n = 0; n < W; ++n) {
        Vec acc[R] = {};
        for (int64_t d = 0; d < steps && j + n < keys.end; d += W) {
          const Vec key = words(k + (j + n) * stride, d, dim);
          for (int r = 0; r < R; ++r) acc[r] = Compute::dot(key, load(queries + r * steps + d), acc[r]);
        }
        for (int r = 0; r < R; ++r) product[r][n] = acc[r];
      }
      for (int r = 0; r < R; ++r) store(s + r * kSplitKeys + j, reduce(product[r], [](Vec a, Vec b) { return a + b; }));
    }
  }

  // Those of all rows, by tiles: a tile of keys is loaded from where they lie. Returns the first key that is left to
  // do.
  int64_t multiply_by_tiles([[maybe_unused]] const T* k, Span keys, [[maybe_unused]] float* queries,
                            [[maybe_unused]] float* s) const {
#if defined(__AMX_BF16__)
    if constexpr (kTiles) {
      if (rows > W || p_.dim % (2 * W) != 0) return keys.begin;
      const TileScope tiles;
      float* right = s + rows * kSplitKeys;  // B[k, r] is word k of row r
      for (int64_t d = 0; d < query_words_; d += W) {
        Vec v[W];
        for (int r = 0; r < W; ++r) v[r] = r < rows ? load(queries + r * query_words_ + d) : Vec{};
        transpose(v);
        for (int n = 0; n < W; ++n) store(right + (d + n) * W, v[n]);
      }
      alignas(64) float products[W * W];
      int64_t j = keys.begin;
      for (; j + W <= keys.end; j += W) {
        fence();
        _tile_zero(0);
        const T* row = k + j * p_.key_strides.row;
        for (int64_t d = 0; d < query_words_; d += W) {
          _tile_loadd(4, row + 2 * d, p_.key_strides.row * 2);
          _tile_loadd(6, right + d * W, 64);
          _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, products, 64);
        fence();
        Vec v[W];
        for (int n = 0; n < W; ++n) v[n] = load(products + n * W);
        transpose(v);
        for (int64_t r = 0; r < W; ++r) {
          if (r < rows) store(s + r * kSplitKeys + j, v[r]);
        }
      }
      return j;
    }
#endif
    return keys.begin;
  }

  // P @ value of R rows. p: words.
  template <int R>
  void add_values(const float* p, Span keys, const T* v, float* out) const {
    int64_t i = 0;
    if constexpr (Compute::per_word == 2) {
      for (; i + 4 * W <= p_.value_dim; i += 4 * W) add_pairs<R, 2>(p, keys, v, i, out);
      for (; i < p_.value_dim; i += 2 * W) add_pairs<R, 1>(p, keys, v, i, out);
    } else {
      for (; i + 4 * W <= p_.value_dim; i += 4 * W) add_vectors<R, 4>(p, keys, v + i, out + i, All{});
      for (; i + W <= p_.value_dim; i += W) add_vectors<R, 1>(p, keys, v + i, out + i, All{});
      if (i < p_.value_dim) add_vectors<R, 1>(p, keys, v + i, out + i, First{static_cast<int>(p_.value_dim - i)});
    }
  }

  // N vectors of each. What has no weight is left out: it may be a NaN.
  template <int R, int N, class Lanes>
  TW_INLINE void add_vectors(const float* p, Span keys, const T* v, float* out, Lanes lanes) const {
    Vec acc[R][N] = {};
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      Vec value[N];
      for (int n = 0; n < N; ++n) value[n] = load(v + j * p_.value_strides.row + n * W, lanes);
      for (int r = 0; r < R; ++r) {
        const float weight = p[r * kSplitKeys + j];
        if (weight == 0.0f) continue;
        for (int n = 0; n < N; ++n) acc[r][n] += value[n] * weight;
      }
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) store(out + r * (width_ + W) + n * W, acc[r][n]);
  }

  // Elements [i, i + 2 W N) by pairs of keys, which are interleaved on the way; so are the halves of each 128 bits,
  // until the sums are stored. What has no weight in any row is left out.
  template <int R, int N>
  TW_INLINE void add_pairs(const float* p, Span keys, const T* v, int64_t i, float* out) const {
#if defined(__AVX512BF16__)
    const int64_t stride = p_.value_strides.row, dim = p_.value_dim;
    Vec low[R][N] = {}, high[R][N] = {};
    for (int64_t j = keys.begin; j < keys.end; j += 2) {
      Vec weight[R];
      uint32_t any = 0;
      for (int r = 0; r < R; ++r) {
        uint32_t word;
        std::memcpy(&word, p + r * kSplitKeys + j / 2, sizeof word);
        any |= word;
        weight[r] = from_bits(VecU{} + word);
      }
      if (any == 0) continue;
      for (int n = 0; n < N; ++n) {
        const T* at = v + j * stride;
        const int64_t word = i / 2 + W * n;
        const auto even = any & 0xffffu ? (__m512i)words(at, word, dim) : __m512i{};
        const auto odd = any >> 16 ? (__m512i)words(at + stride, word, dim) : __m512i{};
        const Vec first = (Vec)_mm512_unpacklo_epi16(even, odd), second = (Vec)_mm512_unpackhi_epi16(even, odd);
        for (int r = 0; r < R; ++r) {
          low[r][n] = Compute::dot(first, weight[r], low[r][n]);
          high[r][n] = Compute::dot(second, weight[r], high[r][n]);
        }
      }
    }
    VecI front, back;
    for (int l = 0; l < W; ++l) {
      front[l] = l / 8 * 4 + l % 4 + l / 4 % 2 * W;
      back[l] = front[l] + W / 2;
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) {
        float* to = out + r * (width_ + W) + i + 2 * W * n;
        store(to, shuffle(low[r][n], high[r][n], front));
        if (i + 2 * W * n + W < width_) store(to + W, shuffle(low[r][n], high[r][n], back));
      }
#endif
  }

  const Params& p_;
  const int64_t group_, query_words_, width_;
  float* const partials_;
};

}  // namespace
}  // namespace torchweld::cpu
