// The whole call of scaled_dot_product_attention; whole_call.h says what a whole call is.
#pragma once

#include <cmath>

#include "bindings/attention.h"
#include "bindings/whole_call.h"

namespace torchweld {
namespace whole {

// The mask as a view (B, H, Nq, Nk): broadcast dimensions have stride 0.
struct ExpandedMask {
  TensorView view{};
  int64_t shape[4], strides[4];

  // Whether `mask` broadcasts to `sizes`, in a dtype that scores take.
  bool fits(const TensorView& mask, const int64_t (&sizes)[4], dlpack::DataType scores) {
    const bool additive = dtype_of(mask.dtype).has_value() &&
                          (mask.dtype.bits == 32 || (mask.dtype.code == scores.code && mask.dtype.bits == scores.bits));
    if ((mask.dtype.code != dlpack::kBool && !additive) || mask.ndim < 1 || mask.ndim > 4) return false;
    for (int d = 3, from = mask.ndim - 1; d >= 0; --d, --from) {
      const bool broadcast = from < 0 || mask.shape[from] == 1;
      if (!broadcast && mask.shape[from] != sizes[d]) return false;
      shape[d] = sizes[d];
      strides[d] = broadcast ? 0 : mask.strides[from];
    }
    if (strides[3] > 1) return false;
    view = mask;
    view.ndim = 4;
    view.shape = shape;
    view.strides = strides;
    return true;
  }
};

// Whether the three tensors are (B, H, N, D) with heads that fit, and elements of a row side by side.
inline bool are_heads(const TensorView& q, const TensorView& k, const TensorView& v, bool grouped) {
  for (const TensorView* t : {&q, &k, &v})
    if (t->ndim != 4 || t->numel() == 0 || (t->size(-1) > 1 && t->stride(-1) != 1) || t->dtype.code != q.dtype.code ||
        t->dtype.bits != q.dtype.bits)
      return false;
  const bool heads = grouped ? q.size(1) % k.size(1) == 0 : q.size(1) == k.size(1);
  return heads && k.size(1) == v.size(1) && q.size(0) == k.size(0) && q.size(0) == v.size(0) &&
         q.size(3) == k.size(3) && k.size(2) == v.size(2);
}

// heads_like(query, size): the function that makes an output in the layout of a query.
template <class Backend>
py::object attention(Object query, Object key, Object value, Object attn_mask, Object dropout_p, Object is_causal,
                     Object scale, Object enable_gqa, Object heads_like) {
  const auto& surroundings = Surroundings::get();
  CommonTensors tensors;
  TensorView q, k, v, given;
  ExpandedMask mask;
  const bool masked = attn_mask.source != Py_None, causal = is_causal.source == Py_True;
  const bool options_fit = PyFloat_CheckExact(dropout_p.source) && PyFloat_AS_DOUBLE(dropout_p.source) == 0.0 &&
                           PyBool_Check(is_causal.source) && PyBool_Check(enable_gqa.source) && !(masked && causal) &&
                           (scale.source == Py_None || PyFloat_CheckExact(scale.source));
  if (!options_fit || !surroundings.are_plain() || surroundings.autocast_is_on() || !tensors.reads(query, q) ||
      !tensors.reads(key, k) || !tensors.reads(value, v) || !dtype_of(q.dtype) ||
      !are_heads(q, k, v, enable_gqa.source == Py_True))
    return py::none();
  if (masked &&
      (!tensors.reads(attn_mask, given) || !mask.fits(given, {q.size(0), q.size(1), q.size(2), k.size(2)}, q.dtype)))
    return py::none();
  if (tensors.want_grad()) return py::bool_(true);

  const Arguments args("attention", Backend::device, q);
  Modifiers modifiers;
  if (masked) modifiers.bias = mask.view;
  Options options;
  options.scale = static_cast<float>(scale.source == Py_None ? 1.0 / std::sqrt(static_cast<double>(q.size(3)))
                                                             : PyFloat_AS_DOUBLE(scale.source));
  if (causal) options.right = 0;
  AttentionForwardParams p{};
  fill_inputs<Backend>(args, p, q, k, v, modifiers, options);
  fill_scores(args, p, modifiers, options);
  const bool alike = q.size(3) == v.size(3) && CommonTensors::are_neighbours(q);
  py::object output = alike
                          ? surroundings.empty_like(query.source)
                          : py::reinterpret_borrow<py::object>(heads_like.source)(py::handle(query.source), v.size(3));
  run_attention_forward<Backend>(args, p, q, CommonTensors::made(output));
  return output;
}

}  // namespace whole

template <class Backend>
void bind_whole_attention(Module& m) {
  m.def("whole_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, heads_like)",
        &whole::attention<Backend>);
}

}  // namespace torchweld
