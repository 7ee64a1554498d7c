// Attention, forward.
//
//   m = max(scores)    P = exp(scores - m)    l = sum(P)    output = P @ value / l    lse = m + log(l)
//
// A task owns a tile of queries of one head and walks over the tiles of keys that it can see, keeping m, l and P @ value
// of what it has seen (the online softmax: Milakov, Gimelshein, arXiv:1805.02867; tiled: Dao et al., arXiv:2205.14135).
// m need not be the maximum: any estimate will do that keeps exp within the range of float32. So a row takes the maximum of
// the first scores it sees, and a tile of keys is weighed in one pass, a chunk after the other while it is in L1. Only where
// that overflows is the tile weighed again, against its true maximum.
// Keys and values are packed once per head for all its tiles: by a first pass over all threads, or, where there are heads
// enough to keep the threads busy, by the task that owns the whole head, so that they are still in cache.
// 2 Nq Nk (D + Dv) FLOPs per head; memory is O(N): the packed keys and values and the tiles of each thread.

#include "cpu/attention_decode.h"
#include "cpu/attention_sequences.h"
#include "cpu/kernels.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kTileQueries = 96;

template <class Compute>
constexpr int64_t kTileKeys = Compute::per_word == 2 ? 512 : 256;

// Products are made and weighed for so many rows and keys at a time. Whole tiles, in place, where the micro-kernel wants to
// keep a panel of keys in L1 for many rows; with tile registers, few enough that they never leave L1 themselves.
template <class Compute>
constexpr int64_t kGroup = Compute::tiles ? 16 : kTileQueries;
template <class Compute>
constexpr int64_t kChunk = Compute::tiles ? 128 : kTileKeys<Compute>;

// Weights of one tile may add up to this in a lane before they are weighed again. Their precision does not depend on their
// size, but in float32 that of a large exponent would be the worse for it.
template <class Compute>
constexpr float kMostWeight = Compute::per_word == 2 ? 0x1p40f : 0x1p12f;

// Sizes of a sequence, all in words. Every part of the workspace starts on a cache line.
template <class T>
struct ForwardPlan {
  using Compute = typename ComputeOf<T>::type;
  // In words, of a row of products and of weights. No powers of two: rows would share cache sets.
  static constexpr int64_t product_stride = kChunk<Compute> + 16;
  static constexpr int64_t weight_stride = Compute::tiles ? kTileKeys<Compute> / 2 : product_stride;
  // Of products: those at hand, and with tiles those of the next chunk, or of a whole row of chunks to be weighed again.
  static constexpr int64_t product_words = Compute::tiles ? kGroup<Compute> * product_stride * (kTileKeys<Compute> / kChunk<Compute>) : 0;

  int64_t steps, value_width;      // of a query or key, of a value
  int64_t key_words, value_words;  // packed, per head
  int64_t tile, tiles;             // of queries

  explicit ForwardPlan(const AttentionInputs& p) {
    steps = words_of<Compute>(p.dim);
    value_width = round_up(p.value_dim, W);
    key_words = round_up(p.keys, kPanel) * steps;
    value_words = right_in_place<T, Compute>(p.value_dim) ? 0 : words_of<Compute>(p.keys) * value_width;
    value_words = round_up(value_words, 16);
    tiles = max_of(ceil_div(p.queries, kTileQueries), 1);
    tile = round_up(ceil_div(p.queries, tiles), Compute::block_rows);
  }

  int64_t tile_words() const {
    return round_up(kTileQueries * steps, 16) + kTileQueries * (weight_stride + value_width) + product_words;
  }
  int64_t packed_words() const { return key_words + value_words; }
};

// How the work is shared out, and the workspace: the table of the sequences, what is packed once, each thread's scratch.
template <class T>
struct ForwardLayout {
  int64_t threads, shared = 0, scratch = 0;
  bool whole_heads;

  explicit ForwardLayout(const AttentionForwardParams& p) : threads(threads_for(p, 2)) {
    const Pairs pairs(p);
    const bool one_tile = p.queries <= kTileQueries && p.heads == p.kv_heads;
    whole_heads = threads == 1 || one_tile || pairs.total * p.kv_heads >= 4 * threads * pairs.most;
    int64_t packed = 0;
    for_each_sequence(p, [&](const AttentionForwardParams& sequence) {
      const ForwardPlan<T> plan(sequence);
      packed = max_of(packed, plan.packed_words());
      scratch = plan.tile_words();
      shared += own_words(sequence);
    });
    scratch += whole_heads ? packed : 0;
  }

  int64_t own_words(const AttentionForwardParams& sequence) const {
    return whole_heads ? 0 : sequence.batch * sequence.kv_heads * ForwardPlan<T>(sequence).packed_words();
  }
  int64_t workspace(const AttentionForwardParams& p) const {
    return threads * scratch + Sequences<AttentionForwardParams>::table_words(p) + shared;
  }
};

// m and l of the rows of a tile; m is in units of log2, l a sum per lane.
struct SoftmaxState {
  alignas(64) float max[kTileQueries];
  Vec sum[kTileQueries], weight[kTileQueries];  // weight: of the tile of keys at hand

  void init(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      max[r] = -kInfinity;
      sum[r] = zero();
    }
  }

  // What to subtract from the scores of row r: -inf - -inf would be NaN.
  float subtract(int64_t r) const { return max[r] == -kInfinity ? 0.0f : max[r]; }

  // Row r sees scores up to `largest`; returns what its sums so far are to be multiplied by.
  float raise(int64_t r, float largest) {
    const float before = max[r];
    max[r] = largest > before ? largest : before;
    const float factor = __builtin_exp2f(before - subtract(r));
    sum[r] = sum[r] * factor;
    return factor;
  }

  // The sums are final, but for the sink. What P @ value is to be multiplied by, and the logarithm of the denominator.
  void finish(int64_t r, const float* sink, float& inverse, float& lse) const {
    float total = cpu::sum(sum[r]), top = max[r], factor = 1.0f;
    if (sink != nullptr && *sink != -kInfinity) {
      const float other = *sink * kLog2e;
      top = other > max[r] ? other : max[r];
      factor = __builtin_exp2f(max[r] - top);
      total = total * factor + __builtin_exp2f(other - top);
    }
    inverse = total == 0.0f ? 0.0f : factor / total;
    lse = total == 0.0f ? -kInfinity : top * kLn2 + __builtin_logf(total);
  }
};

template <class T>
class Forward {
  using Plan = ForwardPlan<T>;
  using Compute = typename Plan::Compute;
  static constexpr int64_t kBlockRows = Compute::block_rows, kBlocks = kTileQueries / kBlockRows;
  static_assert(kTileQueries % kBlockRows == 0 && (kGroup<Compute> % kBlockRows == 0 || kBlockRows % kGroup<Compute> == 0),
                "whole blocks");

  using Params = AttentionForwardParams;

 public:
  static void run(const Params& p) {
    const ForwardLayout<T> layout(p);
    auto scratch = [&](int64_t thread) { return p.workspace + thread * layout.scratch; };
    Sequences<Params> sequences(p, scratch(layout.threads), [&](const Params& one) { return layout.own_words(one); });
    if (layout.whole_heads) {
      auto heads = [](const Params& one) { return one.batch * one.kv_heads; };
      sequences.for_each_unit(layout.threads, heads, [&](const Params& one, int64_t head, int64_t thread, float*) {
        const Forward call(one);
        float* packed = scratch(thread) + call.plan_.tile_words();
        call.pack(head, 0, one.keys, packed);
        for (int64_t g = 0; g < call.group_; ++g)
          for (int64_t t = 0; t < call.plan_.tiles; ++t) call.attend(head, g, t, packed, scratch(thread));
      });
      return;
    }
    constexpr int64_t kKeys = 4 * kPanel;
    auto chunks = [](const Params& one) { return one.batch * one.kv_heads * ceil_div(one.keys, kKeys); };
    sequences.for_each_unit(layout.threads, chunks, [](const Params& one, int64_t unit, int64_t, float* shared) {
      const Forward call(one);
      const int64_t count = ceil_div(one.keys, kKeys), head = unit / count, begin = unit % count * kKeys;
      call.pack(head, begin, min_of(begin + kKeys, one.keys), shared + head * call.plan_.packed_words());
    });
    // Last tiles first: under a causal mask they are the longest.
    auto tiles = [](const Params& one) { return one.batch * one.heads * ForwardPlan<T>(one).tiles; };
    sequences.for_each_unit(layout.threads, tiles, [&](const Params& one, int64_t unit, int64_t thread, float* shared) {
      const Forward call(one);
      const int64_t heads = one.batch * one.heads, tile = call.plan_.tiles - 1 - unit / heads, head = unit % heads;
      const float* packed = shared + head / call.group_ * call.plan_.packed_words();
      call.attend(head / call.group_, head % call.group_, tile, packed, scratch(thread));
    });
  }

 private:
  explicit Forward(const Params& p) : p_(p), plan_(p), group_(p.heads / p.kv_heads) {}

  // Of packed values.
  int64_t value_step() const { return Compute::tiles ? 16 : plan_.value_width; }
  int64_t value_panel() const { return Compute::tiles ? 16 * words_of<Compute>(p_.keys) : kPanel; }

  // Keys [begin, end) of a head, begin a multiple of kPanel.
  void pack(int64_t head, int64_t begin, int64_t end, float* packed) const {
    const int64_t b = head / p_.kv_heads, h = head % p_.kv_heads, ks = p_.key_strides.row, vs = p_.value_strides.row;
    pack_transposed<T, Compute>(head_of<T>(p_.key, p_.key_strides, b, h) + begin * ks, ks, end - begin, p_.dim,
                                packed + begin * plan_.steps);
    // A tile reads some values past those that its rows see. What no query sees may be a NaN: zeros stand for it.
    const int64_t seen = min_of(end, Band(p_).high(p_.queries - 1)) - begin;
    if (!right_in_place<T, Compute>(p_.value_dim) && seen > 0)
      pack_rows<T, Compute>(head_of<T>(p_.value, p_.value_strides, b, h) + begin * vs, vs, seen, p_.value_dim,
                            packed + plan_.key_words + begin / Compute::per_word * value_step(), value_panel());
  }

  // One tile of queries of query head `g` of the group that shares kv head `head`.
  void attend(int64_t head, int64_t g, int64_t tile, const float* packed, float* scratch) const {
    const int64_t b = head / p_.kv_heads, hk = head % p_.kv_heads, h = hk * group_ + g;
    const int64_t i0 = tile * plan_.tile, rows = min_of(plan_.tile, p_.queries - i0);
    if (rows <= 0) return;
    const Scores scores(p_, b, h);
    const Band& band = scores.band;

    // Load.
    float* weights = scratch + round_up(kTileQueries * plan_.steps, 16);
    float* o = weights + kTileQueries * Plan::weight_stride;
    float* products = Compute::tiles ? o + kTileQueries * plan_.value_width : weights;
    const T* q = head_of<T>(p_.query, p_.query_strides, b, h) + i0 * p_.query_strides.row;
    Left left{scratch, plan_.steps, 1};
    if (left_in_place<T, Compute>(p_.query_strides.row, p_.dim))
      left = {reinterpret_cast<const float*>(q), p_.query_strides.row / Compute::per_word, 1};
    else
      pack_left<T, Compute>(q, p_.query_strides.row, rows, p_.dim, scratch);
    Right values{packed + plan_.key_words, value_step(), value_panel()};
    if (right_in_place<T, Compute>(p_.value_dim))
      values = {reinterpret_cast<const float*>(head_of<T>(p_.value, p_.value_strides, b, hk)), p_.value_strides.row, kPanel};
    const Right keys{packed, Compute::panel, Compute::panel * plan_.steps};
    SoftmaxState state;
    state.init(rows);
    std::memset(o, 0, sizeof(float) * rows * plan_.value_width);

    const TileScope tiles;
    const int64_t end = band.high(i0 + rows - 1);
    for (int64_t j0 = round_down(band.low(i0), kPanel); j0 < end; j0 += kTileKeys<Compute>) {
      // What each block of rows sees of this tile.
      const int64_t width = min_of(kTileKeys<Compute>, end - j0);
      Span columns[kBlocks], steps[kBlocks];
      for (int64_t m = 0; m < rows; m += kBlockRows) {
        const int64_t low = min_of(max_of(band.low(i0 + m) - j0, 0), width);
        const int64_t high = min_of(band.high(i0 + min_of(m + kBlockRows, rows) - 1) - j0, width);
        columns[m / kBlockRows] = steps[m / kBlockRows] = {0, 0};
        if (low >= high) continue;
        columns[m / kBlockRows] = {round_down(low, Compute::column_unit), round_up(high, Compute::column_unit)};
        steps[m / kBlockRows] = {round_down(low / Compute::per_word, Compute::step_unit),
                                 round_up(ceil_div(high, Compute::per_word), Compute::step_unit)};
      }
      const Tile at{i0, j0, rows, columns, left, {keys.data + j0 * plan_.steps, keys.step, keys.panel}, products, weights};
      weigh(scores, state, at);
      for (int64_t r = 0; r < rows; r += kGroup<Compute>)
        if (!add_weights(state, r, min_of(r + kGroup<Compute>, rows))) weigh_again(scores, state, at, r, o);
      gemm_accumulate<Compute>(rows, plan_.value_width, {weights, Plan::weight_stride, 1},
                               {values.data + j0 / Compute::per_word * values.step, values.step, values.panel}, steps, o,
                               plan_.value_width);
    }

    // Normalise. Store.
    T* out = head_of<T>(p_.output, p_.output_strides, b, h) + i0 * p_.output_strides.row;
    float* lse = p_.lse != nullptr ? p_.lse + p_.row(b, h) + i0 : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      float inverse, denominator;
      state.finish(r, p_.sinks != nullptr ? p_.sinks + h : nullptr, inverse, denominator);
      inverse *= scores.dropout.scale();
      for_each_vector(p_.value_dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        store(out + r * p_.output_strides.row + i, load(o + r * plan_.value_width + i) * inverse, lanes);
      });
      if (lse != nullptr) lse[r] = denominator;
    }
  }

  // A tile of queries against a tile of keys.
  struct Tile {
    int64_t i0, j0, rows;
    const Span* columns;  // that each block of rows sees
    Left queries;
    Right keys;
    float *products, *weights;

    // What row r sees of the columns [begin, begin + kChunk), counted from there.
    TW_INLINE Span seen(int64_t r, int64_t begin) const {
      const Span span = columns[r / kBlockRows];
      return {max_of(span.begin - begin, 0), min_of(span.end - begin, kChunk<Compute>)};
    }
  };

  // Rows [first, first + kGroup) and columns [begin, begin + kChunk).
  TW_INLINE void multiply(const Tile& at, int64_t first, int64_t begin, float* products) const {
    const int64_t count = min_of(kGroup<Compute>, at.rows - first);
    Span part[kBlocks];
    for (int64_t n = 0; n < count; n += kBlockRows) part[n / kBlockRows] = at.seen(first + n, begin);
    gemm_store<Compute>(count, plan_.steps, rows_from(at.queries, first),
                        {at.keys.data + begin * plan_.steps, at.keys.step, at.keys.panel}, part, products,
                        Plan::product_stride);
  }

  static TW_INLINE Vec largest(const float* row, Span span) {
    Vec a = splat(-kInfinity), b = a;
    int64_t j = span.begin;
    for (; j + 2 * W <= span.end; j += 2 * W) {
      a = vmax(load(row + j), a);
      b = vmax(load(row + j + W), b);
    }
    if (j < span.end) a = vmax(load(row + j), a);
    return vmax(a, b);
  }

  // P of a row of scores; returns its sums. In place, a row of P is never ahead of its scores, also where it takes half
  // the room.
  static TW_INLINE Vec exponentiate(const float* row, float* p, Span span, float unit, float subtract) {
    const Vec minus = splat(-subtract);
    Vec a{}, b{};
    int64_t j = span.begin;
    for (; j + 2 * W <= span.end; j += 2 * W) {
      const Vec first = exp2<Compute::exp_degree>(load(row + j) * unit + minus);
      const Vec second = exp2<Compute::exp_degree>(load(row + j + W) * unit + minus);
      a += first;
      b += second;
      Compute::store_row(p, j, first);
      Compute::store_row(p, j + W, second);
    }
    if (j < span.end) {
      const Vec last = exp2<Compute::exp_degree>(load(row + j) * unit + minus);
      a += last;
      Compute::store_row(p, j, last);
    }
    return a + b;
  }

  // P of row r in the chunk of columns that starts at c, of which it sees `span`; returns the sums.
  TW_INLINE Vec weigh_row(const Scores& scores, const SoftmaxState& state, const Tile& at, int64_t r, int64_t c, Span span,
                          const float* row) const {
    float* p = Compute::row_of(at.weights, Plan::weight_stride, r) + Compute::element(c) / Compute::per_word;
    const Vec sums = exponentiate(row, p, span, scores.unit(), state.subtract(r));
    if (scores.dropout.active()) scores.dropout.template drop<Compute>(p, at.i0 + r, at.j0 + c, span);
    return sums;
  }

  // P of the tile, and its sums as state.weight. Products of the next part are made before one is weighed: the tile unit
  // multiplies while the vector units are at it. A chunk of keys stays in cache for all rows.
  TW_INLINE void weigh(const Scores& scores, SoftmaxState& state, const Tile& at) const {
    int64_t begin = kTileKeys<Compute>, end = 0;
    for (int64_t r = 0; r < at.rows; r += kBlockRows) {
      const Span span = at.columns[r / kBlockRows];
      if (span.begin >= span.end) continue;
      begin = min_of(begin, round_down(span.begin, kChunk<Compute>));
      end = max_of(end, span.end);
    }
    for (int64_t r = 0; r < at.rows; ++r) state.weight[r] = zero();
    if (begin >= end) return;

    const int64_t groups = ceil_div(at.rows, kGroup<Compute>), parts = groups * ceil_div(end - begin, kChunk<Compute>);
    auto products = [&](int64_t part) { return at.products + part % 2 * Plan::product_stride * kGroup<Compute>; };
    auto make = [&](int64_t part) __attribute__((always_inline)) {
      if (part < parts) multiply(at, part % groups * kGroup<Compute>, begin + part / groups * kChunk<Compute>, products(part));
    };
    make(0);
    for (int64_t part = 0; part < parts; ++part) {
      make(part + 1);
      const int64_t first = part % groups * kGroup<Compute>, last = min_of(first + kGroup<Compute>, at.rows);
      const int64_t c = begin + part / groups * kChunk<Compute>;
      const bool bare = scores.bare(at.i0 + first, at.i0 + last, at.j0 + c, at.j0 + min_of(c + kChunk<Compute>, end));
      for (int64_t r = first; r < last; ++r) {
        const Span span = at.seen(r, c);
        if (span.begin >= span.end) continue;
        float* row = products(part) + (r - first) * Plan::product_stride;
        if (!bare) scores.finish(row, at.i0 + r, at.j0 + c, span, nullptr);
        if (state.max[r] == -kInfinity) state.max[r] = cpu::max_of(largest(row, span)) * scores.unit();
        state.weight[r] += weigh_row(scores, state, at, r, c, span, row);
      }
    }
  }

  // Adds the weights of rows [first, last) to their sums; false, and nothing is added, where one has become too large.
  static TW_INLINE bool add_weights(SoftmaxState& state, int64_t first, int64_t last) {
    Vec most{};
    for (int64_t r = first; r < last; ++r) most = vmax(state.weight[r], most);
    if (!(cpu::max_of(most) <= kMostWeight<Compute>)) return false;
    for (int64_t r = first; r < last; ++r) state.sum[r] += state.weight[r];
    return true;
  }

  // A group of rows, against the true maximum of what each has seen.
  __attribute__((noinline)) void weigh_again(const Scores& scores, SoftmaxState& state, const Tile& at, int64_t first, float* o) const {
    constexpr int64_t kChunks = kTileKeys<Compute> / kChunk<Compute>;
    auto row_of = [&](int64_t chunk, int64_t r) {
      return at.products + (chunk * kGroup<Compute> + r - first) * Plan::product_stride;
    };
    for (int64_t chunk = 0; chunk < kChunks; ++chunk) multiply(at, first, chunk * kChunk<Compute>, row_of(chunk, first));
    for (int64_t r = first; r < min_of(first + kGroup<Compute>, at.rows); ++r) {
      Vec top = splat(-kInfinity);
      for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
        const Span span = at.seen(r, chunk * kChunk<Compute>);
        if (span.begin >= span.end) continue;
        scores.finish(row_of(chunk, r), at.i0 + r, at.j0 + chunk * kChunk<Compute>, span, nullptr);
        top = vmax(largest(row_of(chunk, r), span), top);
      }
      const float factor = state.raise(r, cpu::max_of(top) * scores.unit());
      float* out = o + r * plan_.value_width;
      for (int64_t i = 0; i < plan_.value_width; i += W) store(out + i, load(out + i) * factor);
      for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
        const Span span = at.seen(r, chunk * kChunk<Compute>);
        if (span.begin < span.end) state.sum[r] += weigh_row(scores, state, at, r, chunk * kChunk<Compute>, span, row_of(chunk, r));
      }
    }
  }

  const AttentionForwardParams& p_;
  const Plan plan_;
  const int64_t group_;
};

}  // namespace

namespace TORCHWELD_ISA {

int64_t attention_forward_workspace(const AttentionForwardParams& p) {
  if (decodes(p)) return attention_decode_workspace(p);
  int64_t size = 0;
  dispatch(p.dtype, [&](auto t) { size = ForwardLayout<typename decltype(t)::type>(p).workspace(p); });
  return size;
}

void attention_forward(const AttentionForwardParams& p) {
  if (p.batch * p.heads * p.total_q == 0) return;
  if (decodes(p)) return attention_decode(p);
  dispatch(p.dtype, [&](auto t) { Forward<typename decltype(t)::type>::run(p); });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
