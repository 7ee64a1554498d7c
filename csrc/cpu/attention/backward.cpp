// Attention, backward. With P = exp(scores - max) * inverse, recomputed tile by tile from the forward's statistics:
//
//   delta = rowsum(P * dP) - dlse = rowsum(doutput * output) - dlse        dscores = P * (doutput @ value^T - delta)
//   dvalue = P^T @ doutput     dquery = scale * dscores @ key     dkey = scale * dscores^T @ query
//
// Prepare: every head's delta, and query and doutput packed; where sums_rows() says so, delta by products. Main: a task
// owns a chunk of the keys of one key head, all of its query heads and all queries that see the chunk; dkey and dvalue
// of a tile of keys stay in its cache, dquery goes to a partial sum of its own. Finish: the chunks' partials are added
// first to last. How many chunks there are depends on the shape alone, so the sums have one order at any number of
// threads. 2 Nq Nk (3 D + 2 Dv) FLOPs per head; memory is O(N) per chunk. Every gradient is accumulated in float32.
// Dao: FlashAttention-2, arXiv:2307.08691.

#include "cpu/attention/backward_bias.h"
#include "cpu/isa/kernels.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kPrepareRows = 192;  // of queries, per task of the first and the last pass

template <class T, class Compute>
class Backward {
  using Plan = BackwardPlan<T, Compute>;
  using Tile = typename Plan::Tile;
  using Params = AttentionBackwardParams;

  // The workspace: each thread's scratch, the table of the sequences, what belongs to each of them.
  struct Layout {
    int64_t threads, pairs, scratch = 0, own = 0;

    explicit Layout(const Params& p) : threads(threads_for(p, 5)), pairs(Pairs(p).total) {
      for_each_sequence(p, [&](const Params& one) {
        scratch = max_of(scratch, plan(one).tile_words(one));
        own += plan(one).own_words(one);
      });
    }

    Plan plan(const Params& one) const {
      return {one,
              pairs == 0 ? 1.0 : static_cast<double>(one.batch * one.queries * one.keys) / static_cast<double>(pairs)};
    }
  };

 public:
  static int64_t workspace(const Params& p) {
    const Layout layout(p);
    return layout.threads * layout.scratch + Sequences<Params>::table_words(p) + layout.own;
  }

  static void run(const Params& p) {
    const Layout layout(p);
    auto scratch = [&](int64_t thread) { return p.workspace + thread * layout.scratch; };
    Sequences<Params> sequences(p, scratch(layout.threads),
                                [&](const Params& one) { return layout.plan(one).own_words(one); });
    // body(call, unit, thread) for units(call) units.
    auto for_each_unit = [&](auto units, auto body) {
      sequences.for_each_unit(
          layout.threads, [&](const Params& one) { return units(Backward(one, layout, nullptr)); },
          [&](const Params& one, int64_t unit, int64_t thread, float* own) {
            body(Backward(one, layout, own), unit, thread);
          });
    };
    auto heads = [](const Backward& call) { return call.p_.batch * call.p_.heads; };
    auto blocks = [](const Backward& call) { return call.p_.batch * call.p_.heads * call.blocks(); };
    auto chunks = [](const Backward& call) { return call.p_.batch * call.p_.kv_heads * call.plan_.chunks; };

    for_each_unit(blocks, [](const Backward& call, int64_t unit, int64_t) {
      const Span rows = call.block(unit % call.blocks());
      const int64_t head = unit / call.blocks(), heads = call.p_.heads;
      call.queries(head).pack(call.p_, head / heads, head % heads, rows.begin, rows.end, call.plan_.tile_keys);
    });
    if constexpr (Tile::Shared::kUsed) {
      auto heads_of_keys = [](const Backward& call) { return call.p_.batch * call.p_.kv_heads; };
      for_each_unit(heads_of_keys, [](const Backward& call, int64_t unit, int64_t) { call.shared_.find(unit); });
    }
    if (sums_rows(p)) {
      auto tiles = [](const Backward& call) { return call.p_.batch * call.p_.heads * call.tiles(); };
      for_each_unit(tiles, [&](const Backward& call, int64_t unit, int64_t thread) {
        call.sum_rows(unit / call.tiles(), unit % call.tiles(), scratch(thread));
      });
    }
    const Backward whole(p, layout, scratch(layout.threads));  // of a call that is not packed, as one with a bias is
    if (whole.dbias_.dense())
      for_each_unit(heads, [](const Backward& call, int64_t head, int64_t) { call.dbias_.clear(head); });
    // First chunks first: under a causal mask they are the longest.
    for_each_unit(chunks, [&](const Backward& call, int64_t unit, int64_t thread) {
      const int64_t kv_heads = call.p_.batch * call.p_.kv_heads;
      call.differentiate(unit % kv_heads, unit / kv_heads, scratch(thread));
    });
    if (p.dsinks != nullptr)
      for_each_unit(heads, [](const Backward& call, int64_t head, int64_t) { call.sink_gradient(head); });
    if (whole.dbias_.wanted() && !whole.dbias_.dense())
      whole.dbias_.sum(layout.threads, layout.scratch, [&](int64_t head) { return whole.queries(head); });
    if (p.dalibi_slopes != nullptr)
      for_each_unit(heads, [](const Backward& call, int64_t head, int64_t) { call.store_dslope(head); });
    if (p.dquery != nullptr)
      for_each_unit(blocks, [](const Backward& call, int64_t unit, int64_t) {
        const Span rows = call.block(unit % call.blocks());
        call.store_dquery(unit / call.blocks(), rows.begin, rows.end);
      });
  }

 private:
  Backward(const Params& p, const Layout& layout, float* own)
      : p_(p),
        plan_(layout.plan(p)),
        dbias_(p, plan_),
        group_(p.heads / p.kv_heads),
        own_(own),
        partials_(own + p.batch * p.heads * plan_.packed),
        shared_(p, partials_ + p.batch * p.heads * plan_.chunks * plan_.partial) {}

  // Of queries, for the first and the last pass.
  int64_t blocks() const { return ceil_div(p_.queries, kPrepareRows); }
  Span block(int64_t n) const { return {n * kPrepareRows, min_of((n + 1) * kPrepareRows, p_.queries)}; }

  typename Tile::Queries queries(int64_t head) const {
    return {p_, head / p_.heads, head % p_.heads, own_ + head * plan_.packed};
  }

  float* partial(int64_t head, int64_t chunk) const {
    return partials_ + (chunk * p_.batch * p_.heads + head) * plan_.partial;
  }

  // The sink's own probability is exp(sink - max) * inverse, its value zero. Where it is so far above the maximum that
  // this would overflow, it is 1, as in a row that sees nothing.
  void sink_gradient(int64_t head) const {
    const typename Tile::Queries rows = queries(head);
    const float sink = p_.sinks[head % p_.heads], unit = score_unit(p_);
    double total = 0;
    for (int64_t i = 0; i < p_.queries; ++i) {
      const float distance = above_sink(splat(rows.max[i]), unit, sink)[0];
      const double inverse = rows.inverse[i];
      const double probability =
          distance < -80.0f || inverse == 0 ? 1 : __builtin_exp(-static_cast<double>(distance)) * inverse;
      total -= probability * static_cast<double>(rows.delta[i]);
    }
    p_.dsinks[head] = sink == -kInfinity ? 0.0f : static_cast<float>(total);
  }

  // Whether one query head has all the queries that see these keys, and so few that dkey and dvalue need no sums.
  bool stores_at_once(int64_t j0, int64_t keys) const {
    return reads_in_place<T, Compute>(p_) && group_ == 1 && p_.queries > 0 && p_.queries <= Tile::kQueries &&
           Band(p_).first(j0) == 0 && Band(p_).last(j0 + keys) == p_.queries;
  }

  // One chunk of keys of one key head, against all query heads that share it.
  void differentiate(int64_t kv_head, int64_t chunk, float* scratch) const {
    const TileScope tiles;
    const int64_t b = kv_head / p_.kv_heads, hk = kv_head % p_.kv_heads, first_head = b * p_.heads + hk * group_;
    const int64_t begin = chunk * plan_.chunk, end = min_of(begin + plan_.chunk, p_.keys);
    float* dk = scratch + Tile::scratch_words(p_, plan_.tile_keys);
    float* dv = dk + plan_.tile_keys * plan_.key_width;
    const int64_t partial_words = p_.dquery != nullptr ? plan_.partial : 0;
    for (int64_t g = 0; g < group_; ++g) std::memset(partial(first_head + g, chunk), 0, sizeof(float) * partial_words);

    for (int64_t j0 = begin; j0 < end; j0 += plan_.tile_keys) {
      const int64_t keys = min_of(plan_.tile_keys, end - j0);
      T* const dkey = head_of<T>(p_.dkey, p_.dkey_strides, b, hk) + j0 * p_.dkey_strides.row;
      T* const dvalue = head_of<T>(p_.dvalue, p_.dvalue_strides, b, hk) + j0 * p_.dvalue_strides.row;
      Tile tile(p_, b, hk, j0, keys, plan_.tile_keys, scratch, shared_.of(kv_head));
      const bool at_once = stores_at_once(j0, keys);
      if (!at_once) {
        std::memset(dk, 0, sizeof(float) * plan_.tile_keys * plan_.key_width);
        std::memset(dv, 0, sizeof(float) * plan_.tile_keys * plan_.value_width);
      }
      for (int64_t g = 0; g < group_; ++g) {
        const Scores scores(p_, b, hk * group_ + g);
        const typename Tile::Queries rows = queries(first_head + g);
        float* dq = partial(first_head + g, chunk);
        const int64_t last = scores.band.last(j0 + keys);
        for (int64_t i0 = round_down(scores.band.first(j0), 2 * Compute::step_unit); i0 < last; i0 += Tile::kQueries) {
          const Span span{i0, min_of(i0 + Tile::kQueries, last)};
          tile.dbias = dbias_.dense() ? dbias_.of_head(first_head + g) : nullptr;
          tile.score(scores, rows, span);
          if (p_.dvalue != nullptr)
            at_once ? tile.store_dvalue(rows, span, dvalue, p_.dvalue_strides.row) : tile.add_dvalue(rows, span, dv);
          if (p_.dkey != nullptr)
            at_once ? tile.store_dkey(rows, span, dkey, p_.dkey_strides.row) : tile.add_dkey(rows, span, dk);
          if (p_.dquery != nullptr) tile.add_dquery(span, dq);
        }
      }
      if (at_once) continue;
      if (p_.dkey != nullptr) store_keys(dk, plan_.key_width, keys, p_.dim, p_.scale, dkey, p_.dkey_strides.row);
      if (p_.dvalue != nullptr)
        store_keys(dv, plan_.value_width, keys, p_.value_dim, 1.0f, dvalue, p_.dvalue_strides.row);
    }
  }

  int64_t tiles() const { return ceil_div(p_.queries, Tile::kQueries); }  // of queries

  double* slope_sums(int64_t head) const {
    float* all = partials_ + p_.batch * p_.heads * plan_.chunks * plan_.partial + Tile::Shared::words(p_);
    return reinterpret_cast<double*>(all) + head * tiles();
  }

  // Whether a gradient is in float32 though the operands are in 16 bits, or weighs the keys of a row by their distance:
  // delta must then be more exact than the output is, whose products may have P in 16 bits.
  static bool sums_rows(const Params& p) {
    const bool wide_bias = p.dbias != nullptr && p.bias_type == MaskType::float32;
    return p.dalibi_slopes != nullptr || (sizeof(T) == 2 && (wide_bias || p.dsinks != nullptr));
  }

  // delta of a block of queries, as the sum of P * dP, and their part in the gradient of the head's slope: the sum of
  // dscores * -|i + shift - j|. Makes the products again, as the gradient of a bias does.
  void sum_rows(int64_t head, int64_t block, float* scratch) const {
    const TileScope tiles;
    const int64_t b = head / p_.heads, h = head % p_.heads;
    const Span span{block * Tile::kQueries, min_of((block + 1) * Tile::kQueries, p_.queries)};
    const Scores scores(p_, b, h);
    const typename Tile::Queries rows = queries(head);
    double sums[Tile::kQueries * 3] = {}, slope = 0;
    const int64_t end = scores.band.high(span.end - 1);
    for (int64_t j0 = round_down(scores.band.low(span.begin), kPanel); j0 < end; j0 += plan_.tile_keys)
      Tile(p_, b, h / group_, j0, min_of(plan_.tile_keys, p_.keys - j0), plan_.tile_keys, scratch)
          .add_distances(scores, rows, span, sums);
    for (int64_t i = span.begin; i < span.end; ++i) {
      const double* row = sums + (i - span.begin) * 3;
      const double dlse = p_.dlse != nullptr ? p_.dlse[p_.row(b, h) + i] : 0.0f,
                   delta = p_.part ? rows.delta[i] : row[2] - dlse;
      if constexpr (!Tile::Queries::summed) rows.delta[i] = static_cast<float>(delta);
      slope -= row[0] - delta * row[1];
    }
    slope_sums(head)[block] = slope;
  }

  void store_dslope(int64_t head) const {
    double total = 0;
    for (int64_t n = 0; n < tiles(); ++n) total += slope_sums(head)[n];
    p_.dalibi_slopes[head] = static_cast<float>(total);
  }

  // Rows of dkey or dvalue, as the tile left them.
  void store_keys(const float* from, int64_t width, int64_t rows, int64_t dim, float factor, T* to,
                  int64_t stride) const {
    if constexpr (Compute::tiles) {
      for (int64_t r = 0; r < rows; r += W)
        for_each_vector(dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          Vec v[W];
          for (int n = 0; n < W; ++n) v[n] = load(from + (i + n) * plan_.tile_keys + r);
          transpose(v);
          for (int64_t n = 0; n < min_of(W, rows - r); ++n) store(to + (r + n) * stride + i, v[n] * factor, lanes);
        });
    } else {
      for (int64_t r = 0; r < rows; ++r)
        for_each_vector(dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          store(to + r * stride + i, load(from + r * width + i) * factor, lanes);
        });
    }
  }

  void store_dquery(int64_t head, int64_t begin, int64_t end) const {
    T* dq = head_of<T>(p_.dquery, p_.dquery_strides, head / p_.heads, head % p_.heads);
    const int64_t next = p_.batch * p_.heads * plan_.partial;
    const typename Tile::Queries rows = queries(head);
    const float* shared = rows.dlse != nullptr ? shared_.of(head / group_) : nullptr;
    auto dlse = [&](int64_t i) { return rows.inverse[i] == 0 ? 0.0f : rows.dlse[i]; };  // 0: nothing is seen
    for (int64_t i = begin; i < end; ++i) {
      const float* row = partial(head, 0) + i * plan_.key_width;
      for_each_vector(p_.dim, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
        Vec total = shared != nullptr ? load(shared + d, lanes) * splat(dlse(i)) : zero();
        for (int64_t c = 0; c < plan_.chunks; ++c) total += load(row + c * next + d);
        store(dq + i * p_.dquery_strides.row + d, total * p_.scale, lanes);
      });
    }
  }

  const Params& p_;
  const Plan plan_;
  const BiasGradient<T, Compute> dbias_;
  const int64_t group_;
  float* const own_;
  float* const partials_;
  const typename Tile::Shared shared_;
};

}  // namespace

namespace TORCHWELD_ISA {

int64_t attention_backward_workspace(const AttentionBackwardParams& p) {
  if constexpr (kMultipliesBf16) {
    if (too_narrow_for_bf16(p)) return avx512::attention_backward_workspace(p);
  }
  int64_t size = 0;
  dispatch_products(p, [&](auto t, auto words) {
    size = Backward<typename decltype(t)::type, typename decltype(words)::type>::workspace(p);
  });
  return size;
}

void attention_backward(const AttentionBackwardParams& p) {
  if constexpr (kMultipliesBf16) {
    if (too_narrow_for_bf16(p)) return avx512::attention_backward(p);
  }
  if (p.kv_heads == 0) return;
  dispatch_products(
      p, [&](auto t, auto words) { Backward<typename decltype(t)::type, typename decltype(words)::type>::run(p); });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
