// Packed sequences. Each is a call of its own, of one batch; the units of work of all of them are handed out together,
// those of the longest first. A call that is not packed is a single sequence, batches and all.
#pragma once

#include "cpu/attention/scores.h"

namespace torchweld::cpu {
namespace {

template <class Void>
void advance(Void*& data, int64_t bytes) {
  if (data != nullptr) data = reinterpret_cast<Void*>(reinterpret_cast<uintptr_t>(data) + bytes);
}

// `p` becomes sequence n alone; returns the bytes of an element.
inline int64_t narrow_inputs(AttentionInputs& p, int64_t n) {
  const int64_t first_query = p.cu_seqlens_q[n], first_key = p.cu_seqlens_k[n];
  const int64_t size = p.dtype == DType::float32 ? 4 : 2;
  p.batch = 1;
  p.queries = p.cu_seqlens_q[n + 1] - first_query;
  p.keys = p.cu_seqlens_k[n + 1] - first_key;
  p.first_row = first_query;
  advance(p.query, first_query * p.query_strides.row * size);
  advance(p.key, first_key * p.key_strides.row * size);
  advance(p.value, first_key * p.value_strides.row * size);
  if (p.alibi_slopes != nullptr) p.alibi_slopes += n * p.alibi_batch_stride;
  return size;
}

inline AttentionForwardParams sequence_of(AttentionForwardParams p, int64_t n) {
  const int64_t size = narrow_inputs(p, n);
  advance(p.output, p.first_row * p.output_strides.row * size);
  if (p.wide_output != nullptr) p.wide_output += p.first_row * p.wide_output_strides.row;
  return p;
}

inline AttentionBackwardParams sequence_of(AttentionBackwardParams p, int64_t n) {
  const int64_t first_key = p.cu_seqlens_k[n], size = narrow_inputs(p, n);
  advance(p.output, p.first_row * p.output_strides.row * (p.output_dtype == DType::float32 ? 4 : 2));
  advance(p.doutput, p.first_row * p.doutput_strides.row * size);
  advance(p.dquery, p.first_row * p.dquery_strides.row * size);
  advance(p.dkey, first_key * p.dkey_strides.row * size);
  advance(p.dvalue, first_key * p.dvalue_strides.row * size);
  if (p.dalibi_slopes != nullptr) p.dalibi_slopes += n * p.heads;
  if (p.dsinks != nullptr) p.dsinks += n * p.heads;
  return p;
}

inline int64_t pairs_of(const AttentionInputs& p, int64_t n) {
  return (int64_t{p.cu_seqlens_q[n + 1]} - p.cu_seqlens_q[n]) * (int64_t{p.cu_seqlens_k[n + 1]} - p.cu_seqlens_k[n]);
}

// Pairs of a query and a key: of all batches or sequences, and of the one with the most.
struct Pairs {
  int64_t total, most;

  explicit Pairs(const AttentionInputs& p) : total(p.batch * p.queries * p.keys), most(p.queries * p.keys) {
    if (p.cu_seqlens_q == nullptr) return;
    total = most = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      total += pairs_of(p, n);
      most = max_of(most, pairs_of(p, n));
    }
  }
};

// f(type, words) for the type of a call and the words that its products are made of. To take float32 apart is worth its
// while from a few hundred queries and keys on. Forward and backward choose alike, for the backward makes P again.
template <class F>
TW_INLINE void dispatch_products(const AttentionInputs& p, F&& f) {
  dispatch(p.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    using Words = typename ComputeOf<T>::type;
    if constexpr (Words::parts == 3) {
      if (min_of(p.queries, p.keys) < 256) return f(t, Tag<Fp32>{});
    }
    f(t, Tag<Words>{});
  });
}

// Whether the kernels of float32 products serve a call in bf16 here. The rounding of dscores to bf16 averages out over
// the head: in narrow ones, keys with a common part leave dquery off by up to three times what the rule of exactness
// allows.
inline bool too_narrow_for_bf16(const AttentionInputs& p) { return p.dtype == DType::bfloat16 && p.dim <= 8; }
constexpr bool kMultipliesBf16 = VectorComputeOf<bf16>::type::per_word == 2;

// A second thread is worth its start from about this many FLOPs on.
inline int64_t threads_for(const AttentionInputs& p, int64_t flops_per_product) {
  const int64_t flops = Pairs(p).total * p.heads * (p.dim + p.value_dim) * flops_per_product;
  return min_of(max_threads(), 1 + flops / 1000000);
}

// body(sequence) for each.
template <class Params, class Body>
void for_each_sequence(const Params& p, Body&& body) {
  if (p.cu_seqlens_q == nullptr) return body(p);
  for (int64_t n = 0; n < p.batch; ++n) body(sequence_of(p, n));
}

// The sequences in the order of their work, and the part of the workspace that belongs to each.
template <class Params>
class Sequences {
  struct Row {
    int64_t index, first_task, offset;
  };

 public:
  static int64_t table_words(const Params& p) {
    return p.cu_seqlens_q == nullptr ? 0 : round_up(p.batch * static_cast<int64_t>(sizeof(Row) / sizeof(float)), 16);
  }

  // own_words(sequence): how much of `memory`, from the table's end on, a sequence keeps to itself.
  template <class Words>
  Sequences(const Params& p, float* memory, Words&& own_words)
      : p_(p), rows_(reinterpret_cast<Row*>(memory)), own_(memory + table_words(p)) {
    if (p.cu_seqlens_q == nullptr) return;
    int64_t offset = 0;
    for (int64_t n = 0; n < p.batch; ++n) {
      rows_[n] = {n, 0, offset};
      offset += own_words(sequence_of(p, n));
    }
    // Shell's sort.
    for (int64_t gap = p.batch / 2; gap > 0; gap /= 2)
      for (int64_t n = gap; n < p.batch; ++n) {
        const Row row = rows_[n];
        int64_t to = n;
        for (; to >= gap && pairs_of(p, rows_[to - gap].index) < pairs_of(p, row.index); to -= gap)
          rows_[to] = rows_[to - gap];
        rows_[to] = row;
      }
  }

  // body(sequence, unit, thread, own memory) for the units(sequence) units of every sequence.
  template <class Units, class Body>
  void for_each_unit(int64_t threads, Units&& units, Body&& body) {
    if (p_.cu_seqlens_q == nullptr) {
      parallel_queue(units(p_), threads, [&](int64_t unit, int64_t thread) { body(p_, unit, thread, own_); });
      return;
    }
    int64_t total = 0;
    for (int64_t n = 0; n < p_.batch; ++n) {
      rows_[n].first_task = total;
      total += units(sequence_of(p_, rows_[n].index));
    }
    parallel_queue(total, threads, [&](int64_t task, int64_t thread) {
      int64_t low = 0, high = p_.batch;  // the last row with first_task <= task is in [low, high)
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (rows_[middle].first_task <= task ? low : high) = middle;
      }
      const Params sequence = sequence_of(p_, rows_[low].index);
      body(sequence, task - rows_[low].first_task, thread, own_ + rows_[low].offset);
    });
  }

 private:
  const Params& p_;
  Row* const rows_;
  float* const own_;
};

}  // namespace
}  // namespace torchweld::cpu
