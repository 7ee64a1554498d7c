// attention_forward and attention_backward, each with the size of its workspace: tensors -> params, for any backend.
#pragma once

#include <cmath>

#include "bindings/tensor.h"

namespace torchweld {

using OptionalTensor = std::optional<TensorView>;

inline Strides strides_of(const TensorView& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// Query (B, H, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv): the sizes and the pointers of all three.
inline void fill_inputs(const Arguments& args, AttentionInputs& p, const TensorView& query, const TensorView& key,
                        const TensorView& value) {
  for (const auto& [t, name] : {std::pair{&query, "query"}, {&key, "key"}, {&value, "value"}})
    if (t->ndim != 4) args.fail(name, "4 dimensions (batch, heads, rows, head size)", std::to_string(t->ndim));
  p.batch = query.size(0);
  p.heads = query.size(1);
  p.queries = query.size(2);
  p.dim = query.size(3);
  p.kv_heads = key.size(1);
  p.keys = key.size(2);
  p.value_dim = value.size(3);
  p.dtype = args.dtype(query, "query");
  if (p.dim < 1) args.fail("query", "a head size of at least 1", "0");
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0)
    args.fail("key", "a number of heads that divides query's " + std::to_string(p.heads), std::to_string(p.kv_heads));
  p.query = args.strided(query, "query", p.dtype, {p.batch, p.heads, p.queries, p.dim});
  p.key = args.strided(key, "key", p.dtype, {p.batch, p.kv_heads, p.keys, p.dim});
  p.value = args.strided(value, "value", p.dtype, {p.batch, p.kv_heads, p.keys, p.value_dim});
  p.query_strides = strides_of(query);
  p.key_strides = strides_of(key);
  p.value_strides = strides_of(value);
}

inline MaskType mask_type(const Arguments& args, const TensorView& bias) {
  if (bias.dtype.code == dlpack::kBool) return MaskType::boolean;
  switch (args.dtype(bias, "bias")) {
    case DType::float32: return MaskType::float32;
    case DType::bfloat16: return MaskType::bfloat16;
    case DType::float16: return MaskType::float16;
  }
  return MaskType::none;
}

// What shapes the scores. left, right: -1 for unbounded.
inline void fill_scores(const Arguments& args, AttentionInputs& p, const OptionalTensor& bias, const OptionalTensor& alibi,
                        const OptionalTensor& sinks, float scale, float softcap, int64_t left, int64_t right,
                        bool bottom_right, const TensorView& workspace) {
  p.scale = scale;
  p.softcap = softcap;
  p.left = left < 0 || left > kUnbounded ? kUnbounded : left;
  p.right = right < 0 || right > kUnbounded ? kUnbounded : right;
  p.shift = bottom_right ? p.keys - p.queries : 0;
  p.bias_type = MaskType::none;
  if (bias) {
    p.bias_type = mask_type(args, *bias);
    p.bias = args.expanded(*bias, "bias", {p.batch, p.heads, p.queries, p.keys});
    p.bias_strides = strides_of(*bias);
    p.bias_step = bias->size(3) > 1 ? bias->stride(3) : 0;
    if (p.bias_step > 1 || p.bias_step < 0) args.fail("bias", "stride 0 or 1 in the last dimension", std::to_string(p.bias_step));
  }
  if (alibi) {
    p.alibi_slopes = static_cast<const float*>(args.strided(*alibi, "alibi_slopes", DType::float32, {p.batch, p.heads}));
    p.alibi_batch_stride = alibi->stride(0);
  }
  if (sinks) p.sinks = static_cast<const float*>(args.contiguous(*sinks, "sinks", DType::float32, {p.heads}));
  p.workspace_size = workspace.numel();
  p.workspace = static_cast<float*>(args.flat(workspace, "workspace", DType::float32, p.workspace_size));
}

template <class Backend>
void bind_attention(py::module_& m) {
  // How many floats of workspace attention_forward wants with these arguments.
  m.def("attention_forward_workspace", [](const TensorView& query, const TensorView& key, const TensorView& value,
                                          const OptionalTensor& lse) {
    const Arguments args("attention_forward_workspace", Backend::device, query);
    AttentionForwardParams p{};
    fill_inputs(args, p, query, key, value);
    if (lse) p.lse = static_cast<float*>(args.contiguous(*lse, "lse", DType::float32, {p.batch, p.heads, p.queries}));
    return Backend::kernels().attention_forward_workspace(p);
  });

  // How many attention_backward wants.
  m.def("attention_backward_workspace", [](const TensorView& query, const TensorView& key, const TensorView& value,
                                           const TensorView& doutput) {
    const Arguments args("attention_backward_workspace", Backend::device, query);
    AttentionBackwardParams p{};
    fill_inputs(args, p, query, key, value);
    args.strided(doutput, "doutput", p.dtype, {p.batch, p.heads, p.queries, p.value_dim});
    p.doutput_strides = strides_of(doutput);
    return Backend::kernels().attention_backward_workspace(p);
  });

  // bias: expanded to (B, H, Nq, Nk); alibi: (B, H); sinks: (H); output: (B, H, Nq, Dv); lse: float32 (B, H, Nq).
  m.def("attention_forward", [](const TensorView& query, const TensorView& key, const TensorView& value,
                                const OptionalTensor& bias, const OptionalTensor& alibi, const OptionalTensor& sinks,
                                float scale, float softcap, int64_t left, int64_t right, bool bottom_right,
                                const TensorView& output, const OptionalTensor& lse, const TensorView& workspace) {
    const Arguments args("attention_forward", Backend::device, query);
    AttentionForwardParams p{};
    fill_inputs(args, p, query, key, value);
    fill_scores(args, p, bias, alibi, sinks, scale, softcap, left, right, bottom_right, workspace);
    p.output = args.strided(output, "output", p.dtype, {p.batch, p.heads, p.queries, p.value_dim});
    p.output_strides = strides_of(output);
    if (lse) p.lse = static_cast<float*>(args.contiguous(*lse, "lse", DType::float32, {p.batch, p.heads, p.queries}));
    if (const int64_t needed = Backend::kernels().attention_forward_workspace(p); p.workspace_size < needed)
      args.fail("workspace", "at least " + std::to_string(needed) + " elements", std::to_string(p.workspace_size));
    Backend::run(&Backend::Kernels::attention_forward, p, query.device.index);
  });

  // As above. dlse: float32 (B, H, Nq); dbias: contiguous, 4 dimensions; dsinks: (B, H).
  m.def("attention_backward", [](const TensorView& doutput, const OptionalTensor& dlse, const TensorView& query,
                                 const TensorView& key, const TensorView& value, const OptionalTensor& bias,
                                 const OptionalTensor& alibi, const OptionalTensor& sinks, const TensorView& output,
                                 const TensorView& lse, float scale, float softcap, int64_t left, int64_t right,
                                 bool bottom_right, const OptionalTensor& dquery, const OptionalTensor& dkey,
                                 const OptionalTensor& dvalue, const OptionalTensor& dbias, const OptionalTensor& dsinks,
                                 const TensorView& workspace) {
    const Arguments args("attention_backward", Backend::device, query);
    AttentionBackwardParams p{};
    fill_inputs(args, p, query, key, value);
    fill_scores(args, p, bias, alibi, sinks, scale, softcap, left, right, bottom_right, workspace);
    const int64_t B = p.batch, H = p.heads, N = p.queries;
    p.output = args.strided(output, "output", p.dtype, {B, H, N, p.value_dim});
    p.doutput = args.strided(doutput, "doutput", p.dtype, {B, H, N, p.value_dim});
    p.output_strides = strides_of(output);
    p.doutput_strides = strides_of(doutput);
    p.lse = static_cast<const float*>(args.contiguous(lse, "lse", DType::float32, {B, H, N}));
    if (dlse) p.dlse = static_cast<const float*>(args.contiguous(*dlse, "dlse", DType::float32, {B, H, N}));
    auto gradient = [&](const OptionalTensor& t, const char* name, const TensorView& of, void*& data, Strides& strides) {
      if (!t) return;
      data = args.strided(*t, name, p.dtype, {of.size(0), of.size(1), of.size(2), of.size(3)});
      strides = strides_of(*t);
    };
    gradient(dquery, "dquery", query, p.dquery, p.dquery_strides);
    gradient(dkey, "dkey", key, p.dkey, p.dkey_strides);
    gradient(dvalue, "dvalue", value, p.dvalue, p.dvalue_strides);
    if (dbias) {
      if (!bias || bias->dtype.code == dlpack::kBool) args.fail("dbias", "an additive bias to be differentiated", "none");
      p.dbias = args.flat(*dbias, "dbias", args.dtype(*bias, "bias"), dbias->numel());
      for (int d = 0; d < 4; ++d) {
        p.dbias_extents[d] = dbias->ndim == 4 ? dbias->size(d) : 0;
        if (p.dbias_extents[d] != bias->size(d) && (p.dbias_extents[d] != 1 || bias->stride(d) != 0))
          args.fail("dbias", "bias's extent, or 1 where it is broadcast, in dimension " + std::to_string(d),
                    std::to_string(p.dbias_extents[d]));
      }
    }
    if (dsinks) p.dsinks = static_cast<float*>(args.contiguous(*dsinks, "dsinks", DType::float32, {B, H}));
    if (const int64_t needed = Backend::kernels().attention_backward_workspace(p); p.workspace_size < needed)
      args.fail("workspace", "at least " + std::to_string(needed) + " elements", std::to_string(p.workspace_size));
    Backend::run(&Backend::Kernels::attention_backward, p, query.device.index);
  });
}

}  // namespace torchweld
