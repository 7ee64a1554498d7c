// The node of attention whose only modifier is a bias; node.h says what a node is.
#pragma once

#include "bindings/node.h"
#include "bindings/whole_attention.h"

namespace torchweld {
namespace node {

// Query, key, value and a bias or None.
struct CommonHeads {
  CommonTensors tensors = CommonTensors::of_node();
  TensorView query{}, key{}, value{};
  whole::ExpandedMask mask;
  Modifiers modifiers;

  bool reads(Object q, Object k, Object v, Object bias) {
    if (!Surroundings::get().are_plain() || !tensors.reads(q, query) || !tensors.reads(k, key) ||
        !tensors.reads(v, value) || !dtype_of(query.dtype) || !whole::are_heads(query, key, value, true))
      return false;
    if (bias.source == Py_None) return true;
    TensorView given;
    if (!tensors.reads(bias, given) ||
        !mask.fits(given, {query.size(0), query.size(1), query.size(2), key.size(2)}, query.dtype))
      return false;
    modifiers.bias = mask.view;
    return true;
  }
};

// An empty tensor in the layout of `like`, with rows of `size`.
inline py::object rows_like(const Context& node, Object like, const TensorView& view, int64_t size) {
  if (view.size(3) == size && CommonTensors::are_neighbours(view)) return Surroundings::get().empty_like(like.source);
  return node.call_definition(Names::get().heads_like, like.source, py::int_(size).ptr());
}

// numbers: the record Numbers. It keeps lse out of the outputs.
template <class Backend>
py::object attention_forward(Object ctx, Object numbers, Object query, Object key, Object value, Object bias) {
  const Forward node(ctx);
  const Names& names = Names::get();
  const py::object given = attribute(numbers.source, names.options);
  const auto options = read<Options>(given.ptr());
  CommonHeads heads;
  if (options.dropout_p != 0 || !heads.reads(query, key, value, bias))
    return node.by_definition(numbers.source, query.source, key.source, value.source, bias.source);
  const TensorView& q = heads.query;
  const Arguments args("attention", Backend::device, q);
  AttentionForwardParams p{};
  fill_inputs<Backend>(args, p, q, heads.key, heads.value, heads.modifiers, options);
  fill_scores(args, p, heads.modifiers, options);
  py::object output = rows_like(node, query, q, p.value_dim), wide = output;
  if (p.dtype != DType::float32 && Backend::leaves_wide_output) {
    wide = Surroundings::get().floats_like(output.ptr());
    p.wide_output = static_cast<float*>(rows_of(args, p, DType::float32, CommonTensors::made(wide), "wide_output",
                                                p.heads, p.total_q, p.value_dim, p.wide_output_strides));
  }
  py::object statistics = Surroundings::floats(q.device, {2, p.batch, p.heads, p.total_q});
  fill_statistics(args, p, CommonTensors::made(statistics));
  run_attention_forward<Backend>(args, p, q, CommonTensors::made(output));
  node.save(wide.ptr(), statistics.ptr(), query.source, key.source, value.source, bias.source);
  node.set(names.options, given.ptr());
  node.set(names.deterministic, attribute(numbers.source, names.deterministic).ptr());
  return output;
}

// Gradients of numbers, query, key, value and bias; None where the call is not common.
template <class Backend>
py::object attention_gradients(const Backward& node, Object doutput) {
  const Names& names = Names::get();
  const Object query = node.saved(2), key = node.saved(3), value = node.saved(4);
  const py::object needed = node.items(names.needs_input_grad, 5);  // of numbers, query, key, value, bias
  CommonHeads heads;
  TensorView dy, y, rows;
  if (!Backward::is_common() || wants(needed, 4) || !node.get(names.deterministic).is(py::bool_(true)) ||
      !heads.reads(query, key, value, node.saved(5)) || !heads.tensors.reads(doutput, dy) ||
      !heads.tensors.reads(node.saved(0), y) || !heads.tensors.reads(node.saved(1), rows) || dy.ndim != 4 ||
      y.ndim != 4 || (dy.size(-1) > 1 && dy.stride(-1) != 1) || (y.size(-1) > 1 && y.stride(-1) != 1))
    return py::none();
  const auto options = read<Options>(node.get(names.options).ptr());
  if (options.dropout_p != 0) return py::none();
  const TensorView& q = heads.query;
  const Arguments args("attention_backward", Backend::device, q);
  AttentionBackwardParams p{};
  p.deterministic = true;
  fill_inputs<Backend>(args, p, q, heads.key, heads.value, heads.modifiers, options);
  fill_scores(args, p, heads.modifiers, options);
  fill_saved<Backend>(args, p, dy, y, rows);
  const auto made = [&](Py_ssize_t at, Object like, const TensorView& view, const char* name, int64_t count,
                        int64_t total, int64_t size, void*& data, Strides& strides) -> py::object {
    if (!wants(needed, at)) return py::none();
    py::object gradient = rows_like(node, like, view, size);
    data = rows_of(args, p, p.dtype, CommonTensors::made(gradient), name, count, total, size, strides);
    return gradient;
  };
  py::object dquery = made(1, query, q, "dquery", p.heads, p.total_q, p.dim, p.dquery, p.dquery_strides);
  py::object dkey = made(2, key, heads.key, "dkey", p.kv_heads, p.total_k, p.dim, p.dkey, p.dkey_strides);
  py::object dvalue =
      made(3, value, heads.value, "dvalue", p.kv_heads, p.total_k, p.value_dim, p.dvalue, p.dvalue_strides);
  run_attention_backward<Backend>(p, q);
  return py::make_tuple(py::none(), dquery, dkey, dvalue, py::none());
}

template <class Backend>
py::object attention_backward(Object ctx, Object doutput) {
  const Backward node(ctx, 6);
  py::object gradients = attention_gradients<Backend>(node, doutput);
  return gradients.is_none() ? node.by_definition(doutput) : gradients;
}

}  // namespace node

template <class Backend>
void bind_node_attention(Module& m) {
  m.def("node_attention_forward(ctx, numbers, query, key, value, bias)", &node::attention_forward<Backend>);
  m.def("node_attention_backward(ctx, doutput)", &node::attention_backward<Backend>);
}

}  // namespace torchweld
