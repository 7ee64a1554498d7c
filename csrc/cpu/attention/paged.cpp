// Attention over a cache of keys and values in blocks, each batch with a length of its own: a task owns one split of
// the keys of one batch and key head, and gathers their rows first. They are still in cache when they are read. Kwon et
// al.: PagedAttention, arXiv:2309.06180.

#include "cpu/attention/splits.h"
#include "cpu/isa/kernels.h"

namespace torchweld::cpu {
namespace {

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
    parallel_queue(p_.batch * p_.kv_heads * all_.count, threads_, [&](int64_t unit, int64_t thread) {
      const int64_t b = unit / (p_.kv_heads * all_.count), head = unit / all_.count % p_.kv_heads;
      const Params one = batch(b);
      const Splits<T> call(one, partials + b * words);
      const int64_t split = unit % all_.count;
      if (split >= call.count) return;
      float* memory = p_.workspace + thread * scratch();
      T *k = reinterpret_cast<T*>(memory + all_.scratch()), *v = k + kSplitKeys * p_.dim;
      const Span seen = call.seen(split);
      gather(b, split, seen, head_of<T>(p_.key, p_.key_strides, 0, head), p_.key_strides, p_.dim, k);
      gather(b, split, seen, head_of<T>(p_.value, p_.value_strides, 0, head), p_.value_strides, p_.value_dim, v);
      call.attend(head, split, memory, k, v);
    });
    const int64_t rows = p_.kv_heads * all_.rows;
    parallel_queue(ceil_div(p_.batch * rows, kMergeRows), threads_, [&](int64_t unit, int64_t) {
      for (int64_t row = unit * kMergeRows; row < min_of((unit + 1) * kMergeRows, p_.batch * rows); ++row) {
        const Params one = batch(row / rows);
        Splits<T>(one, partials + row / rows * words).merge(row % rows / all_.rows, row % all_.rows);
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
  const Splits<T> all_;
  const int64_t threads_;
};

}  // namespace

namespace TORCHWELD_ISA {

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
