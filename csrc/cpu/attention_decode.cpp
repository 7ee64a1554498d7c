// Attention, forward, for so few queries per key head that packing keys and values would cost more than it saves: decoding
// with a KV cache above all. attention_forward hands such calls over if they want no lse: in float32 these products are not
// the bits that the backward would make again, and with few keys the difference would show in its gradients.
//
// A task owns one split of the keys of one key head, for all of the head's rows (queries of every query head that shares
// it): it reads each key and value once, where they lie, and leaves maximum, sum and P @ value of each row. A last pass
// merges the splits, first to last. Splits depend on the number of keys alone, so results do not on the number of threads.
// Bound by memory: (D + Dv) elements per key and key head.
// Dao, Haziza, Massa, Sizov: Flash-Decoding, 2023.
//
// paged_attention is the same for every batch of a cache in blocks, whose rows a task gathers first.

#include "cpu/attention_decode.h"
#include "cpu/attention_sequences.h"
#include "cpu/kernels.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kSplitKeys = 256;
constexpr int64_t kMergeRows = 64;

template <class T>
class Paged;

template <class T>
class Decode {
  friend class Paged<T>;
  using Compute = typename VectorComputeOf<T>::type;
  static constexpr bool kTiles = ComputeOf<T>::type::tiles && Compute::per_word == 2;
  using Params = AttentionForwardParams;

 public:
  static int64_t workspace(const Params& p) {
    int64_t size = threads_for(p, 2) * Decode(p).scratch() + Sequences<Params>::table_words(p);
    for_each_sequence(p, [&](const Params& one) { size += Decode(one).own_words(); });
    return size;
  }

  static void run(const Params& p) {
    const int64_t threads = threads_for(p, 2), words = Decode(p).scratch();  // of the longest sequence
    Sequences<Params> sequences(p, p.workspace + threads * words, [](const Params& one) { return Decode(one).own_words(); });
    auto splits = [](const Params& one) { return one.batch * one.kv_heads * Decode(one).splits_; };
    sequences.for_each_unit(threads, splits, [&](const Params& one, int64_t unit, int64_t thread, float* partials) {
      const Decode call(one, partials);
      call.attend(unit / call.splits_, unit % call.splits_, p.workspace + thread * words);
    });
    auto rows = [](const Params& one) { return ceil_div(one.batch * one.kv_heads * Decode(one).rows_, kMergeRows); };
    sequences.for_each_unit(threads, rows, [](const Params& one, int64_t unit, int64_t, float* partials) {
      const Decode call(one, partials);
      const int64_t end = min_of((unit + 1) * kMergeRows, one.batch * one.kv_heads * call.rows_);
      for (int64_t row = unit * kMergeRows; row < end; ++row) call.merge(row / call.rows_, row % call.rows_);
    });
  }

 private:
  explicit Decode(const Params& p, float* partials = nullptr)
      : p_(p),
        group_(p.heads / p.kv_heads),
        rows_(group_ * p.queries),
        query_words_(round_up(ceil_div(p.dim, Compute::per_word), W)),
        width_(round_up(p.value_dim, W)),
        splits_(max_of(ceil_div(p.keys, kSplitKeys), 1)),
        partials_(partials) {}

  // Of each thread: the rows' queries and scores; with tiles, their queries transposed as well.
  int64_t scratch() const { return rows_ * (query_words_ + kSplitKeys) + (kTiles ? query_words_ * W : 0); }

  // Of each key head and split: of each row P @ value, maximum and sum.
  int64_t own_words() const { return p_.batch * p_.kv_heads * splits_ * rows_ * (width_ + W); }

  float* partial(int64_t head, int64_t split, int64_t row) const {
    return partials_ + ((head * splits_ + split) * rows_ + row) * (width_ + W);
  }

  // Row r of a key head: query r % Nq of the query head that this returns.
  int64_t query_head(int64_t head, int64_t r) const { return head % p_.kv_heads * group_ + r / p_.queries; }

  // Words [d, d + W) of a row of `dim` elements.
  TW_INLINE static Vec words(const T* row, int64_t d, int64_t dim) {
    Vec v[1];
    load_words<T, Compute>(row, d, dim, v);
    return v[0];
  }

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
    float* s = queries + rows_ * query_words_;
    for (int64_t r = 0; r < rows_; ++r) {
      const T* q = head_of<T>(p_.query, p_.query_strides, b, query_head(head, r)) + r % p_.queries * p_.query_strides.row;
      for (int64_t d = 0; d < query_words_; d += W) store(queries + r * query_words_ + d, words(q, d, p_.dim));
    }

    // Products. Keys that no row sees are not read.
    const Span seen = this->seen(split);
    const int64_t done = multiply_by_tiles(k, seen, queries, s);
    for_rows([&](auto count, int64_t r) { multiply<decltype(count)::value>(k, {done, seen.end}, queries + r * query_words_, s + r * kSplitKeys); });

    for (int64_t r = 0; r < rows_; ++r) {
      float *row = s + r * kSplitKeys, *out = partial(head, split, r);
      const Span span{seen.begin, max_of(round_up(seen.end, W), seen.begin)};
      const Scores scores(p_, b, query_head(head, r));
      scores.finish(row, r % p_.queries, begin, span, nullptr);

      // Softmax. P takes the place of the scores, in words.
      Vec largest = splat(-kInfinity), total{};
      for (int64_t j = span.begin; j < span.end; j += W) largest = vmax(load(row + j), largest);
      const float top = max_of(largest) * scores.unit(), subtract = top == -kInfinity ? 0.0f : top;
      for (int64_t j = span.begin; j < span.end; j += W) {
        const Vec e = exp2<5>(load(row + j) * scores.unit() - subtract);
        total += e;
        Compute::store_row(row, j, e);
      }
      if (scores.dropout.active()) scores.dropout.template drop<Compute>(row, r % p_.queries, begin, span);
      out[width_] = top;
      out[width_ + 1] = sum(total);
    }

    // P @ value.
    for_rows([&](auto count, int64_t r) { add_values<decltype(count)::value>(s + r * kSplitKeys, seen, v, partial(head, split, r)); });
  }

  template <int N>
  struct Count {
    static constexpr int value = N;
  };

  // Four at a time, then one by one.
  template <class Body>
  TW_INLINE void for_rows(Body&& body) const {
    int64_t r = 0;
    for (; r + 4 <= rows_; r += 4) body(Count<4>{}, r);
    for (; r < rows_; ++r) body(Count<1>{}, r);
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

  // Those of all rows, by tiles: a tile of keys is loaded from where they lie. Returns the first key that is left to do.
  int64_t multiply_by_tiles([[maybe_unused]] const T* k, Span keys, [[maybe_unused]] float* queries, [[maybe_unused]] float* s) const {
#if defined(__AMX_BF16__)
    if constexpr (kTiles) {
      if (rows_ > W || p_.dim % (2 * W) != 0) return keys.begin;
      const TileScope tiles;
      float* right = s + rows_ * kSplitKeys;  // B[k, r] is word k of row r
      for (int64_t d = 0; d < query_words_; d += W) {
        Vec v[W];
        for (int r = 0; r < W; ++r) v[r] = r < rows_ ? load(queries + r * query_words_ + d) : Vec{};
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
          if (r < rows_) store(s + r * kSplitKeys + j, v[r]);
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

  // Elements [i, i + 2 W N) by pairs of keys, which are interleaved on the way; so are the halves of each 128 bits, until
  // the sums are stored. What has no weight in any row is left out.
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
        store(to, __builtin_shuffle(low[r][n], high[r][n], front));
        if (i + 2 * W * n + W < width_) store(to + W, __builtin_shuffle(low[r][n], high[r][n], back));
      }
#endif
  }

  void merge(int64_t head, int64_t r) const {
    const int64_t b = head / p_.kv_heads, h = query_head(head, r), i = r % p_.queries;
    // A row starts from its sink, or from nothing.
    float top = p_.sinks != nullptr ? p_.sinks[h] * kLog2e : -kInfinity;
    for (int64_t n = 0; n < splits_; ++n) {
      const float other = partial(head, n, r)[width_];
      top = other > top ? other : top;
    }
    const float finite = top == -kInfinity ? 0.0f : top;
    float total = p_.sinks != nullptr ? __builtin_exp2f(p_.sinks[h] * kLog2e - finite) : 0.0f;
    for (int64_t n = 0; n < splits_; ++n) {
      float* split = partial(head, n, r);
      split[width_] = __builtin_exp2f(split[width_] - finite);
      total += split[width_ + 1] * split[width_];
    }
    const float inverse = total == 0.0f ? 0.0f : HeadDropout(p_, b, h).scale() / total;
    T* out = head_of<T>(p_.output, p_.output_strides, b, h) + i * p_.output_strides.row;
    for_each_vector(p_.value_dim, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
      Vec value{};
      for (int64_t n = 0; n < splits_; ++n) value += load(partial(head, n, r) + d) * partial(head, n, r)[width_];
      store(out + d, value * inverse, lanes);
    });
    if (p_.lse != nullptr) p_.lse[p_.row(b, h) + i] = total == 0.0f ? -kInfinity : top * kLn2 + __builtin_logf(total);
  }

  const Params& p_;
  const int64_t group_, rows_, query_words_, width_, splits_;
  float* const partials_;
};

// Each batch is a call of its own. All have room for the splits of the longest.
template <class T>
class Paged {
  using Params = AttentionForwardParams;

 public:
  explicit Paged(const PagedAttentionParams& p) : p_(p), all_(p), threads_(threads_for(p, 2)) {}

  int64_t workspace() const { return threads_ * scratch() + all_.own_words(); }

  void run() const {
    float* partials = p_.workspace + threads_ * scratch();
    const int64_t words = all_.own_words() / p_.batch;  // of a batch
    parallel_queue(p_.batch * p_.kv_heads * all_.splits_, threads_, [&](int64_t unit, int64_t thread) {
      const int64_t b = unit / (p_.kv_heads * all_.splits_), head = unit / all_.splits_ % p_.kv_heads;
      const Params one = batch(b);
      const Decode<T> call(one, partials + b * words);
      const int64_t split = unit % all_.splits_;
      if (split >= call.splits_) return;
      float* memory = p_.workspace + thread * scratch();
      T *k = reinterpret_cast<T*>(memory + all_.scratch()), *v = k + kSplitKeys * p_.dim;
      const Span seen = call.seen(split);
      gather(b, split, seen, head_of<T>(p_.key, p_.key_strides, 0, head), p_.key_strides, p_.dim, k);
      gather(b, split, seen, head_of<T>(p_.value, p_.value_strides, 0, head), p_.value_strides, p_.value_dim, v);
      call.attend(head, split, memory, k, v);
    });
    const int64_t rows = p_.kv_heads * all_.rows_;
    parallel_queue(ceil_div(p_.batch * rows, kMergeRows), threads_, [&](int64_t unit, int64_t) {
      for (int64_t row = unit * kMergeRows; row < min_of((unit + 1) * kMergeRows, p_.batch * rows); ++row) {
        const Params one = batch(row / rows);
        Decode<T>(one, partials + row / rows * words).merge(row % rows / all_.rows_, row % all_.rows_);
      }
    });
  }

 private:
  // Of each thread: what a split takes, then its keys and values.
  int64_t scratch() const {
    return all_.scratch() + round_up(kSplitKeys * (p_.dim + p_.value_dim) * static_cast<int64_t>(sizeof(T)), 64) / 4;
  }

  // Batch b alone, over gathered rows.
  Params batch(int64_t b) const {
    Params one = p_;
    one.batch = 1;
    one.keys = one.total_k = p_.cache_seqlens[b];
    advance(one.query, b * p_.query_strides.batch * static_cast<int64_t>(sizeof(T)));
    advance(one.output, b * p_.output_strides.batch * static_cast<int64_t>(sizeof(T)));
    one.key_strides.row = p_.dim;
    one.value_strides.row = p_.value_dim;
    if (one.alibi_slopes != nullptr) one.alibi_slopes += b * p_.alibi_batch_stride;
    if (one.lse != nullptr) one.lse += b * p_.heads * p_.queries;
    return one;
  }

  // Rows `seen` of a split, of `size` elements; `from`: the head in block 0.
  void gather(int64_t b, int64_t split, Span seen, const T* from, const Strides& strides, int64_t size, T* to) const {
    const int32_t* table = p_.block_table + b * p_.table_width;
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      const int64_t key = split * kSplitKeys + j;
      std::memcpy(to + j * size, from + table[key / p_.block_size] * strides.batch + key % p_.block_size * strides.row,
                  size * sizeof(T));
    }
  }

  const PagedAttentionParams& p_;
  const Decode<T> all_;
  const int64_t threads_;
};

}  // namespace

namespace TORCHWELD_ISA {

int64_t attention_decode_workspace(const AttentionForwardParams& p) {
  int64_t size = 0;
  dispatch(p.dtype, [&](auto t) { size = Decode<typename decltype(t)::type>::workspace(p); });
  return size;
}

void attention_decode(const AttentionForwardParams& p) {
  dispatch(p.dtype, [&](auto t) { Decode<typename decltype(t)::type>::run(p); });
}

int64_t paged_attention_workspace(const PagedAttentionParams& p) {
  int64_t size = 0;
  dispatch(p.dtype, [&](auto t) { size = Paged<typename decltype(t)::type>(p).workspace(); });
  return size;
}

void paged_attention(const PagedAttentionParams& p) {
  if (p.batch * p.heads * p.queries == 0) return;
  dispatch(p.dtype, [&](auto t) { Paged<typename decltype(t)::type>(p).run(); });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
