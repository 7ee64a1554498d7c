// Attention, forward.
//
//   m = max(scores)    P = exp(scores - m)    l = sum(P)    output = P @ value / l    lse = m + log(l)
//
// A task owns a tile of queries of one head and walks over the tiles of keys that it can see, keeping m, l and P @
// value of what it has seen (the online softmax: Milakov, Gimelshein, arXiv:1805.02867; tiled: Dao et al.,
// arXiv:2205.14135). Keys and values are packed once per head for all its tiles: by a first pass over all threads, or,
// where there are heads enough to keep the threads busy, by the task that owns the whole head, so that they are still
// in cache. A query or two read keys where they lie (matmul/transposed.h). 2 Nq Nk (D + Dv) FLOPs per head; memory is
// O(N): the packed keys and values and the tiles of each thread.

#include "cpu/attention/decode.h"
#include "cpu/attention/sequences.h"
#include "cpu/attention/softmax.h"
#include "cpu/isa/kernels.h"

namespace torchweld::cpu {
namespace {

// Sizes of a sequence, all in words. Every part of the workspace starts on a cache line.
template <class T, class Compute>
struct ForwardPlan {
  int64_t steps, value_width;      // of a query or key, of a value
  int64_t key_words, value_words;  // packed, per head
  int64_t tile, tiles;             // of queries

  explicit ForwardPlan(const AttentionInputs& p) {
    steps = words_of<Compute>(p.dim);
    value_width = round_up(p.value_dim, W);
    key_words = reads_in_place<T, Compute>(p) ? 0 : round_up(p.keys, kPanel) * steps;
    value_words = right_in_place<T, Compute>(p.value_dim) ? 0 : words_of<Compute>(p.keys) * value_width;
    value_words = round_up(value_words, 16);
    tiles = max_of(ceil_div(p.queries, kTileQueries<Compute>), 1);
    tile = round_up(ceil_div(p.queries, tiles), Compute::block_rows);
  }

  int64_t tile_words() const {
    return round_up(kTileQueries<Compute> * steps, 16) +
           kTileQueries<Compute> * (Softmax<Compute>::weight_stride + value_width) + Softmax<Compute>::product_words;
  }
  int64_t packed_words() const { return key_words + value_words; }
};

// How the work is shared out, and the workspace: the table of the sequences, what is packed once, each thread's
// scratch.
template <class T, class Compute>
struct ForwardLayout {
  int64_t threads, shared = 0, scratch = 0;
  bool whole_heads;

  explicit ForwardLayout(const AttentionForwardParams& p) : threads(threads_for(p, 2)) {
    const Pairs pairs(p);
    const bool one_tile = p.queries <= kTileQueries<Compute> && p.heads == p.kv_heads;
    whole_heads = threads == 1 || one_tile || pairs.total * p.kv_heads >= 4 * threads * pairs.most;
    int64_t packed = 0;
    for_each_sequence(p, [&](const AttentionForwardParams& sequence) {
      const ForwardPlan<T, Compute> plan(sequence);
      packed = max_of(packed, plan.packed_words());
      scratch = plan.tile_words();
      shared += own_words(sequence);
    });
    scratch += whole_heads ? packed : 0;
  }

  int64_t own_words(const AttentionForwardParams& sequence) const {
    return whole_heads ? 0 : sequence.batch * sequence.kv_heads * ForwardPlan<T, Compute>(sequence).packed_words();
  }
  int64_t workspace(const AttentionForwardParams& p) const {
    return threads * scratch + Sequences<AttentionForwardParams>::table_words(p) + shared;
  }
};

template <class T, class Compute>
class Forward {
  using Plan = ForwardPlan<T, Compute>;
  static constexpr int64_t kBlockRows = Compute::block_rows, kBlocks = kTileQueries<Compute> / kBlockRows;

  using Params = AttentionForwardParams;

 public:
  static void run(const Params& p) {
    const ForwardLayout<T, Compute> layout(p);
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
    auto tiles = [](const Params& one) { return one.batch * one.heads * Plan(one).tiles; };
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
    if (!reads_in_place<T, Compute>(p_))
      pack_transposed<T, Compute>(head_of<T>(p_.key, p_.key_strides, b, h) + begin * ks, ks, end - begin, p_.dim,
                                  packed + begin * plan_.steps);
    // A tile reads some values past those that its rows see. What no query sees may be a NaN: zeros stand for it.
    const int64_t seen = min_of(end, Band(p_).high(p_.queries - 1)) - begin;
    if (!right_in_place<T, Compute>(p_.value_dim) && seen > 0)
      pack_rows<T, Compute>(head_of<T>(p_.value, p_.value_strides, b, h) + begin * vs, vs, seen, p_.value_dim,
                            packed + plan_.key_words + words_of<Compute>(begin) * value_step(), value_panel());
  }

  // One tile of queries of query head `g` of the group that shares kv head `head`.
  void attend(int64_t head, int64_t g, int64_t tile, const float* packed, float* scratch) const {
    const int64_t b = head / p_.kv_heads, hk = head % p_.kv_heads, h = hk * group_ + g;
    const int64_t i0 = tile * plan_.tile, rows = min_of(plan_.tile, p_.queries - i0);
    if (rows <= 0) return;
    const Scores scores(p_, b, h);
    const Band& band = scores.band;

    // Load.
    float* weights = scratch + round_up(kTileQueries<Compute> * plan_.steps, 16);
    float* o = weights + kTileQueries<Compute> * Softmax<Compute>::weight_stride;
    float* products = Compute::tiles ? o + kTileQueries<Compute> * plan_.value_width : weights;
    const T* q = head_of<T>(p_.query, p_.query_strides, b, h) + i0 * p_.query_strides.row;
    Left left{scratch, plan_.steps, 1};
    if (left_in_place<T, Compute>(p_.query_strides.row, p_.dim))
      left = {reinterpret_cast<const float*>(q), p_.query_strides.row / Compute::per_word, 1};
    else
      pack_left<T, Compute>(q, p_.query_strides.row, rows, p_.dim, scratch);
    Right values{packed + plan_.key_words, value_step(), value_panel()};
    if (right_in_place<T, Compute>(p_.value_dim))
      values = {reinterpret_cast<const float*>(head_of<T>(p_.value, p_.value_strides, b, hk)), p_.value_strides.row,
                kPanel};
    auto keys = Transposed<Compute>::packed(packed, plan_.steps);
    if (reads_in_place<T, Compute>(p_))
      keys = keys.in_place(head_of<T>(p_.key, p_.key_strides, b, hk), p_.key_strides.row, p_.keys);
    Softmax<Compute> softmax;
    softmax.init(rows, p_.lse != nullptr || exact_softmax(p_));
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
        columns[m / kBlockRows] =
            low < high ? Span{round_down(low, Compute::column_unit), round_up(high, Compute::column_unit)} : Span{0, 0};
        steps[m / kBlockRows] = steps_between<Compute>(low, high);
      }
      softmax.weigh(scores, {i0, j0, rows, plan_.steps, columns, left, keys.from(j0, plan_.steps), products, weights, o,
                             plan_.value_width});
      gemm_accumulate<Compute>(rows, plan_.value_width, {weights, Softmax<Compute>::weight_stride, 1},
                               {values.data + words_of<Compute>(j0) * values.step, values.step, values.panel}, steps, o,
                               plan_.value_width);
    }

    // Normalise. Store.
    T* out = head_of<T>(p_.output, p_.output_strides, b, h) + i0 * p_.output_strides.row;
    float* wide = head_of<float>(p_.wide_output, p_.wide_output_strides, b, h) + i0 * p_.wide_output_strides.row;
    const float* sink = p_.sinks != nullptr ? p_.sinks + h : nullptr;
    for (int64_t first = 0; first < rows; first += W) {
      const int64_t count = min_of(W, rows - first);
      const Vec max = softmax.max(first);
      const Denominator denominator(max, softmax.sum(first), score_unit(p_), sink);
      float factors[W];
      store(factors, denominator.inverse * scores.dropout.scale());
      for (int64_t r = first; r < first + count; ++r)
        for_each_vector(p_.value_dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          const Vec result = load(o + r * plan_.value_width + i) * factors[r - first];
          store(out + r * p_.output_strides.row + i, result, lanes);
          if (sizeof(T) == 2 && p_.wide_output != nullptr)
            store(wide + r * p_.wide_output_strides.row + i, result, lanes);
        });
      auto leave = [&](float* statistic, const Vec& v) {
        if (statistic != nullptr) std::memcpy(statistic + p_.row(b, h) + i0 + first, &v, sizeof(float) * count);
      };
      leave(p_.lse, denominator.lse);
      leave(p_.max, max);
      leave(p_.inverse, denominator.inverse);
    }
  }

  const AttentionForwardParams& p_;
  const Plan plan_;
  const int64_t group_;
};

}  // namespace

namespace TORCHWELD_ISA {

int64_t attention_forward_workspace(const AttentionForwardParams& p) {
  if constexpr (kMultipliesBf16) {
    if (too_narrow_for_bf16(p)) return avx512::attention_forward_workspace(p);
  }
  if (decodes(p)) return attention_decode_workspace(p);
  int64_t size = 0;
  dispatch_products(p, [&](auto t, auto words) {
    size = ForwardLayout<typename decltype(t)::type, typename decltype(words)::type>(p).workspace(p);
  });
  return size;
}

void attention_forward(const AttentionForwardParams& p) {
  if constexpr (kMultipliesBf16) {
    if (too_narrow_for_bf16(p)) return avx512::attention_forward(p);
  }
  if (p.batch * p.heads * p.total_q == 0) return;
  if (decodes(p)) return attention_decode(p);
  dispatch_products(
      p, [&](auto t, auto words) { Forward<typename decltype(t)::type, typename decltype(words)::type>::run(p); });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
