// Attention, forward, for so few queries per key head that packing keys and values would cost more than it saves: decoding
// with a KV cache above all. attention_forward hands such calls over if they want no lse: in float32 these products are not
// the bits that the backward would make again, and with few keys the difference would show in its gradients.
//
// A task owns one split of the keys of one key head, for all of the head's rows (queries of every query head that shares
// it): it reads each key and value once, where they lie, and leaves maximum, sum and P @ value of each row. A last pass
// merges the splits, first to last. Splits depend on the number of keys alone, so results do not on the number of threads.
// Bound by memory: (D + Dv) elements per key and key head.
// Dao, Haziza, Massa, Sizov: Flash-Decoding, 2023.

#include "cpu/attention_decode.h"
#include "cpu/attention_sequences.h"
#include "cpu/kernels.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kSplitKeys = 256;
constexpr int64_t kMergeRows = 64;

template <class T>
class Decode {
  using Compute = typename VectorComputeOf<T>::type;
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

  // Of each thread: the rows' queries and scores.
  int64_t scratch() const { return rows_ * (query_words_ + kSplitKeys); }

  // Of each key head and split: of each row P @ value, maximum and sum.
  int64_t own_words() const { return p_.batch * p_.kv_heads * splits_ * rows_ * (width_ + W); }

  float* partial(int64_t head, int64_t split, int64_t row) const {
    return partials_ + ((head * splits_ + split) * rows_ + row) * (width_ + W);
  }

  // Row r of a key head: query r % Nq of the query head that this returns.
  int64_t query_head(int64_t head, int64_t r) const { return head % p_.kv_heads * group_ + r / p_.queries; }

  // Words [d, d + W) of a row of query or key.
  TW_INLINE Vec words(const T* row, int64_t d) const {
    Vec v[1];
    load_words<T, Compute>(row, d, p_.dim, v);
    return v[0];
  }

  void attend(int64_t head, int64_t split, float* queries) const {
    const int64_t b = head / p_.kv_heads, hk = head % p_.kv_heads;
    const int64_t begin = split * kSplitKeys, width = min_of(kSplitKeys, p_.keys - begin);
    const T* k = head_of<T>(p_.key, p_.key_strides, b, hk) + begin * p_.key_strides.row;
    const T* v = head_of<T>(p_.value, p_.value_strides, b, hk) + begin * p_.value_strides.row;
    float* s = queries + rows_ * query_words_;
    for (int64_t r = 0; r < rows_; ++r) {
      const T* q = head_of<T>(p_.query, p_.query_strides, b, query_head(head, r)) + r % p_.queries * p_.query_strides.row;
      for (int64_t d = 0; d < query_words_; d += W) store(queries + r * query_words_ + d, words(q, d));
    }

    // Products. Keys that no row sees are not read.
    const Band band(p_);
    const Span seen{round_down(max_of(band.low(0) - begin, 0), W), min_of(band.high(p_.queries - 1) - begin, width)};
    for (int64_t j = seen.begin; j < seen.end; j += W)
      for (int64_t r = 0; r < rows_; ++r) {
        Vec product[W];
        for (int n = 0; n < W; ++n) {
          product[n] = zero();
          if (j + n >= seen.end) continue;
          for (int64_t d = 0; d < query_words_; d += W)
            product[n] = Compute::dot(words(k + (j + n) * p_.key_strides.row, d), load(queries + r * query_words_ + d), product[n]);
        }
        store(s + r * kSplitKeys + j, reduce(product, [](Vec a, Vec b) { return a + b; }));
      }

    for (int64_t r = 0; r < rows_; ++r) {
      float *row = s + r * kSplitKeys, *out = partial(head, split, r);
      const Span span{seen.begin, max_of(round_up(seen.end, W), seen.begin)};
      const Scores scores(p_, b, query_head(head, r));
      scores.finish(row, r % p_.queries, begin, span, nullptr);

      // Softmax.
      Vec largest = splat(-kInfinity), total{};
      for (int64_t j = span.begin; j < span.end; j += W) largest = vmax(load(row + j), largest);
      const float top = max_of(largest) * scores.unit(), subtract = top == -kInfinity ? 0.0f : top;
      for (int64_t j = span.begin; j < span.end; j += W) {
        const Vec e = exp2<5>(load(row + j) * scores.unit() - subtract);
        total += e;
        store(row + j, e);
      }
      if (scores.dropout.active()) scores.dropout.template drop<Fp32>(row, r % p_.queries, begin, span);
      out[width_] = top;
      out[width_ + 1] = sum(total);
    }

    // P @ value.
    int64_t r = 0;
    for (; r + 4 <= rows_; r += 4) add_values<4>(s + r * kSplitKeys, seen, v, partial(head, split, r));
    for (; r < rows_; ++r) add_values<1>(s + r * kSplitKeys, seen, v, partial(head, split, r));
  }

  // P @ value of R rows.
  template <int R>
  void add_values(const float* p, Span keys, const T* v, float* out) const {
    int64_t i = 0;
    for (; i + 4 * W <= p_.value_dim; i += 4 * W) add_vectors<R, 4>(p, keys, v + i, out + i, All{});
    for (; i + W <= p_.value_dim; i += W) add_vectors<R, 1>(p, keys, v + i, out + i, All{});
    if (i < p_.value_dim) add_vectors<R, 1>(p, keys, v + i, out + i, First{static_cast<int>(p_.value_dim - i)});
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
  }

  const Params& p_;
  const int64_t group_, rows_, query_words_, width_, splits_;
  float* const partials_;
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

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
