// Attention, forward, for so few queries per key head that packing keys and values would cost more than it saves:
// decoding with a KV cache above all. attention_forward hands such calls over if they want no statistics: in float32
// these products are not the bits that the backward would make again, and with few keys the difference would show in
// its gradients. A task owns one split of the keys of one key head; a last pass merges them.

#include "cpu/attention/decode.h"

#include "cpu/attention/splits.h"
#include "cpu/isa/kernels.h"

namespace torchweld::cpu {
namespace {

using Params = AttentionForwardParams;

template <class T>
int64_t workspace(const Params& p) {
  int64_t size = threads_for(p, 2) * Splits<T>(p).scratch() + Sequences<Params>::table_words(p);
  for_each_sequence(p, [&](const Params& one) { size += Splits<T>(one).own_words(); });
  return size;
}

template <class T>
void decode(const Params& p) {
  const int64_t threads = threads_for(p, 2), words = Splits<T>(p).scratch();  // of the longest sequence
  Sequences<Params> sequences(p, p.workspace + threads * words,
                              [](const Params& one) { return Splits<T>(one).own_words(); });
  auto units = [](const Params& one) { return one.batch * one.kv_heads * Splits<T>(one).count; };
  sequences.for_each_unit(threads, units, [&](const Params& one, int64_t unit, int64_t thread, float* partials) {
    const Splits<T> splits(one, partials);
    splits.attend(unit / splits.count, unit % splits.count, p.workspace + thread * words);
  });
  auto tasks = [](const Params& one) { return ceil_div(one.batch * one.kv_heads * Splits<T>(one).rows, kMergeRows); };
  sequences.for_each_unit(threads, tasks, [](const Params& one, int64_t unit, int64_t, float* partials) {
    const Splits<T> splits(one, partials);
    const int64_t end = min_of((unit + 1) * kMergeRows, one.batch * one.kv_heads * splits.rows);
    for (int64_t row = unit * kMergeRows; row < end; ++row) splits.merge(row / splits.rows, row % splits.rows);
  });
}

}  // namespace

namespace TORCHWELD_ISA {

int64_t attention_decode_workspace(const AttentionForwardParams& p) {
  int64_t size = 0;
  dispatch(p.dtype, [&](auto t) { size = workspace<typename decltype(t)::type>(p); });
  return size;
}

void attention_decode(const AttentionForwardParams& p) {
  dispatch(p.dtype, [&](auto t) { decode<typename decltype(t)::type>(p); });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
