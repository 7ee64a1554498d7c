// The cross-entropy of a linear layer's output, which is never whole in memory.
//
//   logits = input @ weight^T    dlogits = dloss * (softmax(logits) - target)    dinput = dlogits @ weight
//   dweight = dlogits^T @ input
//
// A chunk of rows goes through three passes. Each pass works on blocks of classes, which the threads share.
//   1. Logits of the chunk: a task packs its block of the weight, multiplies, and leaves each row's statistics and
//      weights exp(logit - max) in the place of the logits (classes.h).
//   2. The statistics of the blocks give the loss of each row.
//   3. Gradients: a task turns weights into dlogits, and multiplies them with the weight and, transposed, with the
//   input.
//      dinput is summed in a fixed number of parts, each by one task; dweight of a block belongs to one task.
// 2 N H V FLOPs for each of the three products, none of them twice. Memory: weights of one chunk, packed blocks, and
// what dweight is summed in (weight_sum.h). Weight and its gradient move once per pass and chunk: the larger a chunk,
// the less they cost.

#include "cpu/isa/kernels.h"
#include "cpu/loss/classes.h"
#include "cpu/loss/plan.h"

namespace torchweld::cpu {
namespace {

// A head of few classes, or for few rows, is a narrow product. Each of its logits decides much of a gradient, and torch
// adds up such a product in the lanes of vectors, in short chains.
template <class Format>
struct ShortWhereNarrow : Format {
  static constexpr int64_t narrow_chain = Format::chain / 4;
};

template <class T, class S, class Compute>
class Head {
  using Sizes = Plan<T, S, Compute>;

 public:
  static int64_t workspace(const LinearCrossEntropyParams& p) {
    const Sizes plan(p);
    return plan.shared(p) + threads_of(p) * plan.scratch(p);
  }

  explicit Head(const LinearCrossEntropyParams& p) : p_(p), plan_(p), threads_(threads_of(p)) {
    float* next = p.workspace;
    auto take = [&](int64_t words) { return next += words, next - words; };
    gathered_ =
        reinterpret_cast<T*>(take(round_up(plan_.chunk * p.features * static_cast<int64_t>(sizeof(T)) / 4 + 1, 16)));
    left_ = take(plan_.input_words());
    right_ = take(plan_.gradient ? plan_.right_words() : 0);
    weights_ = reinterpret_cast<S*>(take(plan_.weights_words()));
    statistics_ = reinterpret_cast<BlockStatistics*>(take(plan_.statistics_words()));
    index_ = reinterpret_cast<int64_t*>(take(2 * plan_.chunk));
    target_ = reinterpret_cast<int64_t*>(take(2 * plan_.chunk));
    picked_ = take(plan_.chunk);
    gradients_ = reinterpret_cast<RowGradient*>(take(plan_.chunk * sizeof(RowGradient) / 4));
    dinputs_ = take(plan_.parts * plan_.part_words());
    beside_ = take(plan_.sum_words(p));
    lost_ = take(plan_.lost_words(p));
    scratch_ = next;
  }

  void run() {
    int64_t from = gather(0);
    if (rows_ == 0) return no_row();
    for (bool first = true; rows_ > 0; first = false) {
      const int64_t rows = rows_;
      pack_input();
      parallel_queue(plan_.blocks, threads_, [&](int64_t block, int64_t thread) { logits(block, scratch(thread)); });
      parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
        for (int64_t m = begin; m < end; ++m) finish_row(m);
      });
      const bool last = counted_after(from) == 0;
      if (plan_.gradient) differentiate_chunk(first, last);
      from = gather(from);
    }
  }

 private:
  float* scratch(int64_t thread) const { return scratch_ + thread * plan_.scratch(p_); }
  int64_t width_of(int64_t block) const { return min_of(plan_.width, p_.classes - block * plan_.width); }
  S* weights_of(int64_t block) const { return weights_ + block * plan_.chunk * plan_.width; }
  BlockStatistics& statistics_of(int64_t m, int64_t block) const { return statistics_[m * plan_.blocks + block]; }
  const T* weight_of(int64_t block) const {
    return static_cast<const T*>(p_.weight) + block * plan_.width * p_.features;
  }

  int64_t counted_after(int64_t from) const {
    int64_t count = 0;
    for (int64_t n = from; n < p_.rows && count == 0; ++n) count += p_.target[n] != p_.ignore_index;
    return count;
  }

  // No row counts.
  void no_row() {
    if (p_.dweight != nullptr) std::memset(p_.dweight, 0, sizeof(T) * p_.classes * p_.features);
    if (p_.dbias != nullptr) std::memset(p_.dbias, 0, sizeof(float) * p_.classes);
  }

  // The next rows that count, from row `from` on; returns the row after them.
  int64_t gather(int64_t from) {
    const int64_t H = p_.features;
    const T* input = static_cast<const T*>(p_.input);
    int64_t n = from;
    for (rows_ = 0; n < p_.rows && rows_ < plan_.chunk; ++n) {
      if (p_.target[n] == p_.ignore_index) {
        p_.loss[n] = 0.0f;
        if (p_.dinput != nullptr) std::memset(static_cast<T*>(p_.dinput) + n * H, 0, sizeof(T) * H);
        continue;
      }
      index_[rows_] = n;
      target_[rows_] = p_.target[n];
      std::memcpy(gathered_ + rows_ * H, input + n * H, sizeof(T) * H);
      ++rows_;
    }
    return n;
  }

  void pack_input() {
    const int64_t H = p_.features;
    parallel_for(ceil_div(rows_, 16), 1, [&](int64_t begin, int64_t end) {
      const int64_t m = begin * 16;
      pack_left<T, Compute>(gathered_ + m * H, H, min_of(end * 16, rows_) - m, H, left_ + m * plan_.feature_steps);
    });
    if (p_.dweight != nullptr) pack_rows<T, Compute>(gathered_, H, rows_, H, right_, 16 * words_of<Compute>(rows_));
  }

  // ---- Pass 1

  void logits(int64_t block, float* scratch) {
    const int64_t count = width_of(block), H = p_.features, width = plan_.width;
    float* tile = scratch + width * plan_.feature_steps;
    pack_transposed<T, Compute>(weight_of(block), H, count, H, scratch);
    const Right right{scratch, Compute::panel, Compute::panel * plan_.feature_steps};
    Span columns[kSpans];
    for (Span& span : columns) span = {0, round_up(count, Compute::column_unit)};

    const TileScope tiles;
    const bool capped = p_.softcap != 0.0f;
    const float share = p_.smoothing > 0.0f ? 1.0f / static_cast<float>(p_.classes) : 0.0f;
    const float* bias = p_.bias != nullptr ? p_.bias + block * width : nullptr;
    for (int64_t m0 = 0; m0 < rows_; m0 += kTileRows) {
      const int64_t rows = min_of(kTileRows, rows_ - m0);
      gemm_store<Compute>(rows, plan_.feature_steps, {left_ + m0 * plan_.feature_steps, plan_.feature_steps, 1}, right,
                          columns, tile, width);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t m = m0 + r, target = target_[m] - block * width;
        float* row = tile + r * width;
        finish_logits(row, count, bias, p_.softcap);
        if (target >= 0 && target < count) picked_[m] = row[target];
        S* weights = plan_.gradient ? weights_of(block) + m * width : nullptr;
        statistics_of(m, block) = weigh(row, count, capped, share, weights);
      }
    }
  }

  // ---- Pass 2

  void finish_row(int64_t m) {
    const BlockStatistics* blocks = &statistics_of(m, 0);
    float max = -__builtin_inff();
    for (int64_t b = 0; b < plan_.blocks; ++b) max = blocks[b].max > max ? blocks[b].max : max;
    double sum = 0.0, mean = 0.0;
    const double share = 1.0 / static_cast<double>(p_.classes);
    for (int64_t b = 0; b < plan_.blocks; ++b) {
      sum += static_cast<double>(blocks[b].sum) * exp2<6>(splat((blocks[b].max - max) * kLog2e))[0];
      const float base = blocks[b].max == -__builtin_inff() ? 0.0f : blocks[b].max;
      if (p_.smoothing > 0.0f) mean += blocks[b].mean + share * static_cast<double>(width_of(b)) * (base - max);
    }
    const float log_sum = __builtin_logf(static_cast<float>(sum)), lse = log_sum + max;
    float loss = log_sum - (picked_[m] - max);
    if (p_.smoothing > 0.0f) loss = (1.0f - p_.smoothing) * loss + p_.smoothing * (log_sum - static_cast<float>(mean));
    if (p_.z_loss != 0.0f) loss += p_.z_loss * lse * lse;
    p_.loss[index_[m]] = loss;

    if (!plan_.gradient) return;
    // With one class what the target should have got is 1, and the gradient exactly 0.
    const double dloss = p_.dloss[index_[m]], smoothing = p_.smoothing, other = smoothing * share;
    RowGradient& row = gradients_[m];
    row.max = max;
    row.factor = static_cast<float>(dloss / sum);
    row.extra = 2.0f * p_.z_loss * lse;
    row.others = static_cast<float>(dloss * other);
    row.own = static_cast<float>(dloss * (1.0 - smoothing + other));
  }

  // ---- Pass 3

  void differentiate_chunk(bool first, bool last) {
    const int64_t tasks = max_of(plan_.parts, min_of(plan_.blocks, kParts)), H = p_.features;
    parallel_queue(tasks, threads_, [&](int64_t task, int64_t thread) {
      float* dinput = p_.dinput != nullptr ? dinputs_ + task * plan_.part_words() : nullptr;
      if (dinput != nullptr) std::memset(dinput, 0, sizeof(float) * rows_ * plan_.columns);
      for (int64_t b = plan_.blocks * task / tasks; b < plan_.blocks * (task + 1) / tasks; ++b)
        differentiate_block(b, dinput, scratch(thread), first, last);
    });
    if (p_.dinput == nullptr) return;
    parallel_for(rows_, 8, [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        T* out = static_cast<T*>(p_.dinput) + index_[m] * H;
        for_each_vector(H, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          Vec sum{};
          for (int64_t part = 0; part < tasks; ++part)
            sum = sum + load(dinputs_ + part * plan_.part_words() + m * plan_.columns + i);
          store(out + i, sum, lanes);
        });
      }
    });
  }

  void differentiate_block(int64_t block, float* dinput, float* scratch, bool first, bool last) {
    const int64_t count = width_of(block), width = plan_.width, H = p_.features, columns = plan_.columns;
    float* packed = scratch;
    float* across = packed + round_up(plan_.class_steps * columns, 16);
    float* along = across + plan_.chunk * plan_.class_steps;
    float* dbias = along + round_up(width * plan_.row_steps, 16);
    float* tile = dbias + width;
    S* dlogits = weights_of(block);

    // dlogits.
    for (int64_t m = 0; m < rows_; ++m)
      differentiate(dlogits + m * width, count, target_[m] - block * width, gradients_[m], statistics_of(m, block).max,
                    p_.softcap);
    if (p_.dbias != nullptr)
      add_to_bias(dlogits, rows_, width, count, p_.dbias + block * width, lost_ + block * width, dbias, first, last);

    // dinput.
    const TileScope tiles;
    if (dinput != nullptr) {
      Left left{across, words_of<Compute>(count), 1};
      if (left_in_place<S, Compute>(width, count))
        left = {reinterpret_cast<const float*>(dlogits), width / Compute::per_word, 1};
      else
        pack_left<S, Compute>(dlogits, width, rows_, count, across);
      const int64_t steps = words_of<Compute>(count);
      Right right{packed, Compute::tiles ? 16 : columns, Compute::tiles ? 16 * steps : kPanel};
      if (right_in_place<T, Compute>(H))
        right = {reinterpret_cast<const float*>(weight_of(block)), H, kPanel};
      else
        pack_rows<T, Compute>(weight_of(block), H, count, H, packed, right.panel);
      Span all[kSpans];
      for (Span& span : all) span = {0, steps};
      gemm_accumulate<Compute>(rows_, columns, left, right, all, dinput, columns);
    }

    // dweight.
    if (p_.dweight == nullptr) return;
    const int64_t steps = words_of<Compute>(rows_);
    Left left{along, 1, round_up(count, W)};
    if constexpr (Compute::tiles) {
      left = {along, steps, 1};
      pack_columns<S, Compute>(dlogits, width, rows_, count, along, steps);
    } else if (kNative<S, Compute> && Compute::per_word == 1) {
      left = {reinterpret_cast<const float*>(dlogits), 1, width};
    } else {
      pack_rows<S, Compute>(dlogits, width, rows_, count, along, 0);
    }
    const Right right{right_, Compute::tiles ? 16 : columns, Compute::tiles ? 16 * steps : kPanel};
    Span all[kSpans];
    for (Span& span : all) span = {0, steps};
    for (int64_t v = 0; v < count; v += kTileRows) {
      const int64_t rows = min_of(kTileRows, count - v);
      std::memset(tile, 0, sizeof(float) * rows * columns);
      gemm_accumulate<Compute>(rows, columns, rows_from(left, v), right, all, tile, columns);
      for (int64_t r = 0; r < rows; ++r)
        WeightSum<T>::add(static_cast<T*>(p_.dweight), beside_, (block * width + v + r) * H, H, tile + r * columns,
                          first, last);
    }
  }

  const LinearCrossEntropyParams& p_;
  const Sizes plan_;
  const int64_t threads_;
  int64_t rows_ = 0;      // of the chunk
  T* gathered_;           // the chunk's rows of input
  float *left_, *right_;  // the same packed, for logits and for dweight
  S* weights_;
  BlockStatistics* statistics_;
  int64_t *index_, *target_;
  float* picked_;  // the targets' logits
  RowGradient* gradients_;
  float *dinputs_, *beside_, *lost_, *scratch_;
};

// f(Tag<Head>) of the types that serve a call. A softcap asks for the logits, and these in float32.
template <class F>
TW_INLINE void dispatch_head(const LinearCrossEntropyParams& p, F&& f) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Compute = ShortWhereNarrow<typename ComputeOf<T>::type>;
    if (p.softcap == 0.0f)
      f(Tag<Head<T, typename Kept<T>::type, Compute>>{});
    else
      f(Tag<Head<T, float, Compute>>{});
  });
}

}  // namespace

namespace TORCHWELD_ISA {

int64_t linear_cross_entropy_workspace(const LinearCrossEntropyParams& p) {
  int64_t size = 0;
  dispatch_head(p, [&](auto head) { size = decltype(head)::type::workspace(p); });
  return size;
}

void linear_cross_entropy(const LinearCrossEntropyParams& p) {
  dispatch_head(p, [&](auto head) { typename decltype(head)::type(p).run(); });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
