// attention_forward and attention_backward: tensors -> params, for any backend.
#pragma once

#include <algorithm>

#include "bindings/tensor.h"
#include "params/attention.h"

namespace torchweld {

using OptionalTensor = std::optional<TensorView>;

// The tensors that modify the scores or the softmax.
struct Modifiers {
  OptionalTensor bias, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k;

  static constexpr auto fields() {
    return std::tuple{Field{"bias", &Modifiers::bias},
                      Field{"alibi_slopes", &Modifiers::alibi_slopes},
                      Field{"sinks", &Modifiers::sinks},
                      Field{"seed", &Modifiers::seed},
                      Field{"cu_seqlens_q", &Modifiers::cu_seqlens_q},
                      Field{"cu_seqlens_k", &Modifiers::cu_seqlens_k}};
  }
};

// The numbers. left, right: -1 where the band has no bound; max_seqlen_*: -1 where it is not known. `part` and what
// follows it place a part of a longer attention in the whole; mask_heads, mask_queries: 0 for those of the call.
struct Options {
  float scale = 1, softcap = 0;
  int64_t left = -1, right = -1;
  bool bottom_right = false;
  double dropout_p = 0;
  int64_t max_seqlen_q = -1, max_seqlen_k = -1;
  bool part = false;
  int64_t offset = 0, mask_first = 0, mask_heads = 0, mask_queries = 0, mask_column = 0;

  static constexpr auto fields() {
    return std::tuple{Field{"scale", &Options::scale},
                      Field{"softcap", &Options::softcap},
                      Field{"left", &Options::left},
                      Field{"right", &Options::right},
                      Field{"bottom_right", &Options::bottom_right},
                      Field{"dropout_p", &Options::dropout_p},
                      Field{"max_seqlen_q", &Options::max_seqlen_q},
                      Field{"max_seqlen_k", &Options::max_seqlen_k},
                      Field{"part", &Options::part},
                      Field{"offset", &Options::offset},
                      Field{"mask_first", &Options::mask_first},
                      Field{"mask_heads", &Options::mask_heads},
                      Field{"mask_queries", &Options::mask_queries},
                      Field{"mask_column", &Options::mask_column}};
  }
};

// Reads cu_seqlens. On the CPU also checks its values (it starts at 0, never falls, ends at total) and sets `most` to
// the longest sequence. On a GPU `most` is max_seqlen, at most total.
template <class Backend>
const int32_t* fill_sequences(const Arguments& args, const char* name, const OptionalTensor& lens, int64_t batch,
                              int64_t total, int64_t& most) {
  if (!lens) args.fail(name, "both of cu_seqlens_q and cu_seqlens_k", "None");
  const auto* starts = static_cast<const int32_t*>(args.integers(*lens, name, 32, batch + 1));
  if (!Backend::reads_tensors) {
    most = most < 0 || most > total ? total : most;
    return starts;
  }
  int64_t longest = 0;
  if (starts[0] != 0) args.fail(name, "0 as its first element", std::to_string(starts[0]));
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = int64_t{starts[b + 1]} - starts[b];
    if (length < 0)
      args.fail(
          name, "a sequence that never falls",
          std::to_string(starts[b + 1]) + " after " + std::to_string(starts[b]) + " at index " + std::to_string(b + 1));
    longest = length > longest ? length : longest;
  }
  if (starts[batch] != total)
    args.fail(name, "the number of rows, " + std::to_string(total) + ", as its last element",
              std::to_string(starts[batch]));
  if (most >= 0 && longest > most)
    args.fail(name, "no sequence longer than its max_seqlen of " + std::to_string(most), std::to_string(longest));
  most = longest;
  return starts;
}

// (B, H, N, D), or (total, H, D) if packed.
inline void* rows_of(const Arguments& args, const AttentionInputs& p, DType dtype, const TensorView& t,
                     const char* name, int64_t heads, int64_t rows, int64_t size, Strides& strides) {
  void* data = p.cu_seqlens_q != nullptr ? args.strided(t, name, dtype, {rows, heads, size})
                                         : args.strided(t, name, dtype, {p.batch, heads, rows, size});
  strides =
      p.cu_seqlens_q != nullptr ? Strides{0, t.stride(1), t.stride(0)} : Strides{t.stride(0), t.stride(1), t.stride(2)};
  return data;
}

// float32 (B, H, Nq), or (H, total_q) if packed.
inline float* values_of(const Arguments& args, const AttentionInputs& p, const OptionalTensor& t, const char* name) {
  if (!t) return nullptr;
  return static_cast<float*>(p.cu_seqlens_q != nullptr
                                 ? args.contiguous(*t, name, DType::float32, {p.heads, p.total_q})
                                 : args.contiguous(*t, name, DType::float32, {p.batch, p.heads, p.total_q}));
}

// The row statistics, each float32 (B, H, Nq), or (H, total_q) if packed, in one tensor: lse (1 row), max and inverse
// for the backward (2), or all three.
struct Statistics {
  float *max = nullptr, *inverse = nullptr, *lse = nullptr;

  Statistics(const Arguments& args, const AttentionInputs& p, const TensorView& t) {
    const bool packed = p.cu_seqlens_q != nullptr;
    const int64_t rows = t.ndim > 0 ? t.size(0) : 0, width = (packed ? 1 : p.batch) * p.heads * p.total_q;
    auto* data = static_cast<float*>(
        packed ? args.contiguous(t, "statistics", DType::float32, {rows, p.heads, p.total_q})
               : args.contiguous(t, "statistics", DType::float32, {rows, p.batch, p.heads, p.total_q}));
    if (rows < 1 || rows > 3) args.fail("statistics", "1, 2 or 3 rows", std::to_string(rows));
    if (rows != 2) lse = data + (rows - 1) * width;
    if (rows == 1) return;
    max = data;
    inverse = data + width;
  }
};

inline void fill_statistics(const Arguments& args, AttentionForwardParams& p, const OptionalTensor& statistics) {
  if (!statistics) return;
  const Statistics rows(args, p, *statistics);
  p.max = rows.max;
  p.inverse = rows.inverse;
  p.lse = rows.lse;
}

// Query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv), or packed: the sizes and the pointers of all three.
template <class Backend>
void fill_inputs(const Arguments& args, AttentionInputs& p, const TensorView& query, const TensorView& key,
                 const TensorView& value, const Modifiers& modifiers, const Options& options) {
  const OptionalTensor &lens_q = modifiers.cu_seqlens_q, &lens_k = modifiers.cu_seqlens_k;
  const bool packed = lens_q || lens_k;
  for (const auto& [t, name] : {std::pair{&query, "query"}, {&key, "key"}, {&value, "value"}})
    if (t->ndim != (packed ? 3 : 4))
      args.fail(name,
                packed ? "3 dimensions [total, heads, head size]" : "4 dimensions [batch, heads, rows, head size]",
                std::to_string(t->ndim));
  const int heads = 1, rows = packed ? 0 : 2;
  p.heads = query.size(heads);
  p.kv_heads = key.size(heads);
  p.queries = p.total_q = query.size(rows);
  p.keys = p.total_k = key.size(rows);
  p.dim = query.size(-1);
  p.value_dim = value.size(-1);
  p.dtype = args.dtype(query, "query");
  if (packed) {
    p.batch = lens_q ? std::max<int64_t>(lens_q->numel() - 1, 0) : 0;
    p.queries = options.max_seqlen_q;
    p.keys = options.max_seqlen_k;
    p.cu_seqlens_q = fill_sequences<Backend>(args, "cu_seqlens_q", lens_q, p.batch, p.total_q, p.queries);
    p.cu_seqlens_k = fill_sequences<Backend>(args, "cu_seqlens_k", lens_k, p.batch, p.total_k, p.keys);
  } else {
    p.batch = query.size(0);
  }
  if (p.heads > 0 && (p.kv_heads < 1 || p.heads % p.kv_heads != 0))
    args.fail("key", "a number of heads that divides query's " + std::to_string(p.heads), std::to_string(p.kv_heads));
  p.query = rows_of(args, p, p.dtype, query, "query", p.heads, p.total_q, p.dim, p.query_strides);
  p.key = rows_of(args, p, p.dtype, key, "key", p.kv_heads, p.total_k, p.dim, p.key_strides);
  p.value = rows_of(args, p, p.dtype, value, "value", p.kv_heads, p.total_k, p.value_dim, p.value_strides);
}

inline MaskType mask_type(const Arguments& args, const TensorView& bias) {
  if (bias.dtype.code == dlpack::kBool) return MaskType::boolean;
  switch (args.dtype(bias, "bias")) {
    case DType::float32:
      return MaskType::float32;
    case DType::bfloat16:
      return MaskType::bfloat16;
    case DType::float16:
      return MaskType::float16;
  }
  return MaskType::none;
}

// The modifiers of the scores, and the dropout.
inline void fill_scores(const Arguments& args, AttentionInputs& p, const Modifiers& modifiers, const Options& options) {
  auto bound = [](int64_t keys) { return keys < 0 || keys > kUnbounded ? kUnbounded : keys; };
  p.scale = options.scale;
  p.softcap = options.softcap;
  p.left = bound(options.left);
  p.right = bound(options.right);
  p.bottom_right = options.bottom_right;
  p.part = options.part;
  p.offset = options.offset;
  p.bias_type = MaskType::none;
  if (const OptionalTensor& bias = modifiers.bias) {
    if (p.cu_seqlens_q != nullptr) args.fail("bias", "None beside cu_seqlens_q", "a tensor");
    p.bias_type = mask_type(args, *bias);
    p.bias = args.expanded(*bias, "bias", {p.batch, p.heads, p.queries, p.keys});
    p.bias_strides = {bias->stride(0), bias->stride(1), bias->stride(2)};
    p.bias_step = bias->size(3) > 1 ? bias->stride(3) : 0;
    if (p.bias_step > 1 || p.bias_step < 0)
      args.fail("bias", "stride 0 or 1 in the last dimension", std::to_string(p.bias_step));
  }
  if (const OptionalTensor& alibi = modifiers.alibi_slopes) {
    p.alibi_slopes =
        static_cast<const float*>(args.strided(*alibi, "alibi_slopes", DType::float32, {p.batch, p.heads}));
    p.alibi_batch_stride = alibi->stride(0);
  }
  if (const OptionalTensor& sinks = modifiers.sinks)
    p.sinks = static_cast<const float*>(args.contiguous(*sinks, "sinks", DType::float32, {p.heads}));
  const double dropout_p = options.dropout_p;
  if (!(dropout_p >= 0 && dropout_p <= 1))
    args.fail("dropout_p", "a probability between 0 and 1", std::to_string(dropout_p));
  if (dropout_p > 0) {
    const OptionalTensor& seed = modifiers.seed;
    if (!seed) args.fail("seed", "a tensor beside a dropout_p of " + std::to_string(dropout_p), "None");
    if (options.mask_column < 0 || options.mask_column % 64 != 0)
      args.fail("mask_column", "a multiple of 64", std::to_string(options.mask_column));
    p.dropout =
        make_dropout(static_cast<const int64_t*>(args.integers(*seed, "seed", 64, 1)), dropout_p, options.mask_column);
    p.mask_rows = {options.mask_first, options.mask_heads > 0 ? options.mask_heads : p.heads,
                   options.mask_queries > 0 ? options.mask_queries : p.total_q};
  }
}

template <class Backend>
void run_attention_forward(const Arguments& args, AttentionForwardParams& p, const TensorView& query,
                           const TensorView& output) {
  p.output = rows_of(args, p, p.dtype, output, "output", p.heads, p.total_q, p.value_dim, p.output_strides);
  const Workspace workspace(query.device, Backend::kernels().attention_forward_workspace(p));
  p.workspace = workspace.data();
  Backend::run(&Backend::Kernels::attention_forward, p, query.device.index);
}

// The gradient of the output, and what the forward left: output or wide_output, and statistics.
template <class Backend>
void fill_saved(const Arguments& args, AttentionBackwardParams& p, const TensorView& doutput, const TensorView& output,
                const TensorView& statistics) {
  const bool wide = Backend::leaves_wide_output && args.dtype(output, "output") == DType::float32;
  p.output_dtype = wide ? DType::float32 : p.dtype;
  p.output = rows_of(args, p, p.output_dtype, output, "output", p.heads, p.total_q, p.value_dim, p.output_strides);
  p.doutput = rows_of(args, p, p.dtype, doutput, "doutput", p.heads, p.total_q, p.value_dim, p.doutput_strides);
  const Statistics rows(args, p, statistics);
  p.max = rows.max != nullptr ? rows.max : rows.lse;
  p.inverse = rows.inverse;
}

template <class Backend>
void run_attention_backward(AttentionBackwardParams& p, const TensorView& query) {
  const Workspace workspace(query.device, Backend::kernels().attention_backward_workspace(p));
  p.workspace = workspace.data();
  Backend::run(&Backend::Kernels::attention_backward, p, query.device.index);
}

template <class Backend>
void bind_attention(Module& m) {
  m.def_record<Modifiers>("Modifiers");
  m.def_record<Options>("Options");
  m.attr("leaves_wide_output") = Backend::leaves_wide_output;

  // output, wide_output (float32): (B, H, Nq, Dv), packed (total_q, H, Dv).
  m.def("attention_forward(query, key, value, modifiers, options, output, wide_output, statistics)",
        [](const TensorView& query, const TensorView& key, const TensorView& value, const Modifiers& modifiers,
           const Options& options, const TensorView& output, const OptionalTensor& wide_output,
           const OptionalTensor& statistics) {
          const Arguments args("attention", Backend::device, query);
          AttentionForwardParams p{};
          fill_inputs<Backend>(args, p, query, key, value, modifiers, options);
          fill_scores(args, p, modifiers, options);
          if (wide_output && !Backend::leaves_wide_output) args.fail("wide_output", "None", "a tensor");
          if (wide_output)
            p.wide_output = static_cast<float*>(rows_of(args, p, DType::float32, *wide_output, "wide_output", p.heads,
                                                        p.total_q, p.value_dim, p.wide_output_strides));
          fill_statistics(args, p, statistics);
          run_attention_forward<Backend>(args, p, query, output);
        });

  // output: the forward's output or wide_output; statistics: lse (1 row), or max and inverse; dlse: float32 (B, H, Nq),
  // packed (H, total_q); dbias: contiguous, 4 dimensions; dalibi_slopes, dsinks: (B, H).
  m.def(
      "attention_backward(doutput, dlse, query, key, value, modifiers, options, output, statistics, dquery, dkey, "
      "dvalue, dbias, dalibi_slopes, dsinks, deterministic)",
      [](const TensorView& doutput, const OptionalTensor& dlse, const TensorView& query, const TensorView& key,
         const TensorView& value, const Modifiers& modifiers, const Options& options, const TensorView& output,
         const TensorView& statistics, const OptionalTensor& dquery, const OptionalTensor& dkey,
         const OptionalTensor& dvalue, const OptionalTensor& dbias, const OptionalTensor& dalibi_slopes,
         const OptionalTensor& dsinks, bool deterministic) {
        const Arguments args("attention_backward", Backend::device, query);
        AttentionBackwardParams p{};
        p.deterministic = deterministic;
        fill_inputs<Backend>(args, p, query, key, value, modifiers, options);
        fill_scores(args, p, modifiers, options);
        fill_saved<Backend>(args, p, doutput, output, statistics);
        p.dlse = values_of(args, p, dlse, "dlse");
        if (dquery)
          p.dquery = rows_of(args, p, p.dtype, *dquery, "dquery", p.heads, p.total_q, p.dim, p.dquery_strides);
        if (dkey) p.dkey = rows_of(args, p, p.dtype, *dkey, "dkey", p.kv_heads, p.total_k, p.dim, p.dkey_strides);
        if (dvalue)
          p.dvalue = rows_of(args, p, p.dtype, *dvalue, "dvalue", p.kv_heads, p.total_k, p.value_dim, p.dvalue_strides);
        if (dbias) {
          const OptionalTensor& bias = modifiers.bias;
          if (!bias || bias->dtype.code == dlpack::kBool)
            args.fail("dbias", "an additive bias to be differentiated", "none");
          p.dbias = args.flat(*dbias, "dbias", args.dtype(*bias, "bias"), dbias->numel());
          for (int d = 0; d < 4; ++d) {
            p.dbias_extents[d] = dbias->ndim == 4 ? dbias->size(d) : 0;
            if (p.dbias_extents[d] != bias->size(d) && (p.dbias_extents[d] != 1 || bias->stride(d) != 0))
              args.fail("dbias", "bias's extent, or 1 where it is broadcast, in dimension " + std::to_string(d),
                        std::to_string(p.dbias_extents[d]));
          }
        }
        auto by_head = [&](const OptionalTensor& t, const char* name) {
          return t ? static_cast<float*>(args.contiguous(*t, name, DType::float32, {p.batch, p.heads})) : nullptr;
        };
        p.dalibi_slopes = by_head(dalibi_slopes, "dalibi_slopes");
        if (dalibi_slopes && !modifiers.alibi_slopes)
          args.fail("dalibi_slopes", "alibi_slopes to be differentiated", "none");
        p.dsinks = by_head(dsinks, "dsinks");
        if (dsinks && !modifiers.sinks) args.fail("dsinks", "sinks to be differentiated", "none");
        run_attention_backward<Backend>(p, query);
      });
}

}  // namespace torchweld
