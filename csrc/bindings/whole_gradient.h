// Whole calls of an autograd node: the forward and the backward of a registered op, its outputs allocated and its
// kernel run in one crossing from Python. As all functions for common calls (common_call.h) they return None for any
// other call; the registered op then serves it.
#pragma once

#include "bindings/whole_attention.h"
#include "bindings/whole_call.h"

namespace torchweld {
namespace whole {

// One entry of a mask of wanted gradients.
inline bool wants(Object mask, Py_ssize_t i) {
  const py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(mask.source, i));
  if (!item) throw py::error_already_set();
  return item.ptr() == Py_True;
}

template <class Backend>
py::object gelu_backward(Object doutput, Object input, bool exact) {
  CommonTensors tensors;
  TensorView dy, x;
  if (!Surroundings::get().are_plain() || !tensors.reads(doutput, dy) || !tensors.reads(input, x)) return py::none();
  const auto dtype = dtype_of(x.dtype);
  if (!dtype || !CommonTensors::are_alike(x, dy)) return py::none();
  py::object dinput = Surroundings::get().empty_like(input.source);
  GeluBackwardParams p{};
  p.numel = x.numel();
  p.exact = exact;
  p.dtype = *dtype;
  p.doutput = CommonTensors::data(dy);
  p.input = CommonTensors::data(x);
  p.dinput = CommonTensors::data(CommonTensors::made(dinput));
  Backend::run(&Backend::Kernels::gelu_backward, p, x.device.index);
  return dinput;
}

// (output, stats)
template <class Backend>
py::object norm_forward(Object input, Object weight, Object bias, const Norm& norm) {
  CommonTensors tensors;
  TensorView x;
  LayerNormForwardParams p{};
  if (!reads_rows(tensors, input, norm, x, p) || !reads_parameter(tensors, weight, x, p.cols, p.weight) ||
      !reads_parameter(tensors, bias, x, p.cols, p.bias))
    return py::none();
  py::object stats = Surroundings::floats(x.device, {1 + p.centred, p.rows});
  set_stats(p, static_cast<float*>(CommonTensors::data(CommonTensors::made(stats))));
  p.input = CommonTensors::data(x);
  return py::make_tuple(elementwise<Backend>(&Backend::Kernels::layer_norm_forward, p, x, input.source), stats);
}

// (dinput, None, dweight, dbias), None where mask does not want it.
template <class Backend>
py::object norm_backward(Object doutput, Object dsum, Object input, Object weight, Object bias, Object stats,
                         Object seed, Object mask, const Norm& norm) {
  CommonTensors tensors;
  TensorView dy, x, rows;
  LayerNormBackwardParams p{};
  const void* ignored = nullptr;
  if (dsum.source != Py_None || seed.source != Py_None || wants(mask, 1) || !reads_rows(tensors, input, norm, x, p) ||
      !tensors.reads(doutput, dy) || !CommonTensors::are_alike(x, dy) || !tensors.reads(stats, rows) ||
      !reads_parameter(tensors, weight, x, p.cols, p.weight) || !reads_parameter(tensors, bias, x, p.cols, ignored))
    return py::none();
  const Arguments args("layer_norm_backward", Backend::device, x);
  set_stats(args, p, rows);
  p.input = CommonTensors::data(x);
  p.doutput = CommonTensors::data(dy);
  const auto made = [&](bool wanted, Object like, void*& data) -> py::object {
    if (!wanted || like.source == Py_None) return py::none();
    py::object gradient = Surroundings::get().empty_like(like.source);
    data = CommonTensors::data(CommonTensors::made(gradient));
    return gradient;
  };
  py::object dinput = made(wants(mask, 0), input, p.dinput);
  py::object dweight = made(wants(mask, 2), weight, p.dweight);
  py::object dbias = made(wants(mask, 3), bias, p.dbias);
  const bool weights = p.dweight != nullptr || p.dbias != nullptr;
  p.blocks = Backend::layer_norm_workspace(p.rows, p.cols, weights, x.device.index);
  const Workspace partial(x.device, p.blocks * 2 * p.cols);
  p.partial = partial.data();
  Backend::run(&Backend::Kernels::layer_norm_backward, p, x.device.index);
  return py::make_tuple(dinput, py::none(), dweight, dbias);
}

// (loss, stats, the rows that the loss is a mean of, or 1): the loss as the whole call returns it.
template <class Backend>
py::object cross_entropy_forward(Object logits, Object target, Object ignore_index, Object reduction,
                                 Object smoothing) {
  Losses losses;
  if (!losses.reads(logits, target, ignore_index, reduction, smoothing)) return py::none();
  py::object stats = Surroundings::floats(losses.logits.device, {2, losses.p.rows});
  auto* rows = static_cast<float*>(CommonTensors::data(CommonTensors::made(stats)));
  py::object loss = losses.reduced<Backend>(logits, rows);
  return py::make_tuple(loss, stats, losses.mean ? losses.rows_that_count() : int64_t{1});
}

// dlogits of a loss that is reduced: dloss has one element, and each row's part of it is dloss / rows.
template <class Backend>
py::object cross_entropy_backward(Object dloss, Object logits, Object target, int64_t ignore_index, float smoothing,
                                  Object stats, int64_t rows) {
  CommonTensors tensors;
  TensorView dy, x, classes, found;
  if (!Surroundings::get().are_plain() || !tensors.reads(dloss, dy) || !tensors.reads(logits, x) ||
      !tensors.reads(target, classes) || !tensors.reads(stats, found))
    return py::none();
  const auto dtype = dtype_of(x.dtype), scalar = dtype_of(dy.dtype);
  if (!dtype || dy.ndim != 0 || scalar != DType::float32 || !CommonTensors::are_neighbours(x)) return py::none();
  const Arguments args("cross_entropy_backward", Backend::device, x);
  CrossEntropyBackwardParams p{};
  p.rows = x.size(0);
  p.classes = x.size(1);
  p.ignore_index = ignore_index;
  p.smoothing = smoothing;
  p.dtype = *dtype;
  const double whole = *static_cast<const float*>(CommonTensors::data(dy));
  const std::vector<float> by_row(p.rows, static_cast<float>(whole / static_cast<double>(rows)));
  p.dloss = by_row.data();
  p.logits = CommonTensors::data(x);
  p.target = args.indices(classes, "target", p.rows);
  p.max = static_cast<const float*>(args.contiguous(found, "stats", DType::float32, {2, p.rows}));
  p.sum = p.max + p.rows;
  py::object dlogits = Surroundings::get().empty_like(logits.source);
  p.dlogits = CommonTensors::data(CommonTensors::made(dlogits));
  Backend::run(&Backend::Kernels::cross_entropy_backward, p, x.device.index);
  return dlogits;
}

// Query, key, value and, as the only modifier, a bias.
struct CommonHeads {
  CommonTensors tensors;
  TensorView query{}, key{}, value{};
  ExpandedMask mask;
  Modifiers modifiers;

  bool reads(Object q, Object k, Object v, Object modifiers_tuple) {
    PyObject* tuple = modifiers_tuple.source;
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != static_cast<Py_ssize_t>(kFieldCount<Modifiers>))
      return false;
    for (Py_ssize_t i = 1; i < PyTuple_GET_SIZE(tuple); ++i)
      if (PyTuple_GET_ITEM(tuple, i) != Py_None) return false;
    if (!Surroundings::get().are_plain() || !tensors.reads(q, query) || !tensors.reads(k, key) ||
        !tensors.reads(v, value) || !dtype_of(query.dtype) || !are_heads(query, key, value, true))
      return false;
    PyObject* bias = PyTuple_GET_ITEM(tuple, 0);
    if (bias == Py_None) return true;
    TensorView given;
    if (!tensors.reads(Object{bias}, given) ||
        !mask.fits(given, {query.size(0), query.size(1), query.size(2), key.size(2)}, query.dtype))
      return false;
    modifiers.bias = mask.view;
    return true;
  }
};

// An empty tensor in the layout of `like`, with rows of `size`.
inline py::object rows_like(Object like, const TensorView& view, int64_t size, Object heads_like) {
  if (view.size(3) == size && CommonTensors::are_neighbours(view)) return Surroundings::get().empty_like(like.source);
  return py::reinterpret_borrow<py::object>(heads_like.source)(py::handle(like.source), size);
}

// (output, its float32 form or None, statistics)
template <class Backend>
py::object attention_forward(Object query, Object key, Object value, Object modifiers, const Options& options,
                             int64_t rows, Object heads_like) {
  CommonHeads heads;
  if (!heads.reads(query, key, value, modifiers) || options.dropout_p != 0) return py::none();
  const TensorView& q = heads.query;
  const Arguments args("attention", Backend::device, q);
  AttentionForwardParams p{};
  fill_inputs<Backend>(args, p, q, heads.key, heads.value, heads.modifiers, options);
  fill_scores(args, p, heads.modifiers, options);
  py::object output = rows_like(query, q, p.value_dim, heads_like), wide = py::none();
  if (rows > 1 && p.dtype != DType::float32 && Backend::leaves_wide_output) {
    wide = Surroundings::get().floats_like(output.ptr());
    p.wide_output = static_cast<float*>(rows_of(args, p, DType::float32, CommonTensors::made(wide), "wide_output",
                                                p.heads, p.total_q, p.value_dim, p.wide_output_strides));
  }
  py::object statistics = Surroundings::floats(q.device, {rows, p.batch, p.heads, p.total_q});
  fill_statistics(args, p, CommonTensors::made(statistics));
  run_attention_forward<Backend>(args, p, q, CommonTensors::made(output));
  return py::make_tuple(output, wide, statistics);
}

// Gradients of query, key and value, None where mask does not want them, and None for all others.
template <class Backend>
py::object attention_backward(Object doutput, Object dlse, Object output, Object statistics, Object query, Object key,
                              Object value, Object modifiers, const Options& options, Object mask, Object deterministic,
                              Object heads_like) {
  CommonHeads heads;
  TensorView dy, y, rows;
  if (dlse.source != Py_None || wants(mask, 3) || options.dropout_p != 0 || deterministic.source != Py_True ||
      !heads.reads(query, key, value, modifiers) || !heads.tensors.reads(doutput, dy) ||
      !heads.tensors.reads(output, y) || !heads.tensors.reads(statistics, rows) || dy.ndim != 4 || y.ndim != 4 ||
      (dy.size(-1) > 1 && dy.stride(-1) != 1) || (y.size(-1) > 1 && y.stride(-1) != 1))
    return py::none();
  const TensorView& q = heads.query;
  const Arguments args("attention_backward", Backend::device, q);
  AttentionBackwardParams p{};
  p.deterministic = true;
  fill_inputs<Backend>(args, p, q, heads.key, heads.value, heads.modifiers, options);
  fill_scores(args, p, heads.modifiers, options);
  fill_saved<Backend>(args, p, dy, y, rows);
  py::object gradients[3] = {py::none(), py::none(), py::none()};
  if (wants(mask, 0)) {
    gradients[0] = rows_like(query, q, p.dim, heads_like);
    p.dquery = rows_of(args, p, p.dtype, CommonTensors::made(gradients[0]), "dquery", p.heads, p.total_q, p.dim,
                       p.dquery_strides);
  }
  if (wants(mask, 1)) {
    gradients[1] = rows_like(key, heads.key, p.dim, heads_like);
    p.dkey = rows_of(args, p, p.dtype, CommonTensors::made(gradients[1]), "dkey", p.kv_heads, p.total_k, p.dim,
                     p.dkey_strides);
  }
  if (wants(mask, 2)) {
    gradients[2] = rows_like(value, heads.value, p.value_dim, heads_like);
    p.dvalue = rows_of(args, p, p.dtype, CommonTensors::made(gradients[2]), "dvalue", p.kv_heads, p.total_k,
                       p.value_dim, p.dvalue_strides);
  }
  run_attention_backward<Backend>(p, q);
  return py::make_tuple(gradients[0], gradients[1], gradients[2], py::none(), py::none(), py::none());
}

}  // namespace whole

template <class Backend>
void bind_whole_gradients(Module& m) {
  m.def("whole_gelu_forward(input, exact)",
        [](Object input, bool exact) { return whole::gelu_of<Backend>(input, exact, true); });
  m.def("whole_gelu_backward(doutput, input, exact)", &whole::gelu_backward<Backend>);
  m.def("whole_layer_norm_forward(input, weight, bias, norm)", &whole::norm_forward<Backend>);
  m.def("whole_layer_norm_backward(doutput, dsum, input, weight, bias, stats, seed, mask, norm)",
        &whole::norm_backward<Backend>);
  m.def("whole_cross_entropy_forward(logits, target, ignore_index, reduction, smoothing)",
        &whole::cross_entropy_forward<Backend>);
  m.def("whole_cross_entropy_backward(dloss, logits, target, ignore_index, smoothing, stats, rows)",
        &whole::cross_entropy_backward<Backend>);
  m.def("whole_attention_forward(query, key, value, modifiers, options, rows, heads_like)",
        &whole::attention_forward<Backend>);
  m.def(
      "whole_attention_backward(doutput, dlse, output, statistics, query, key, value, modifiers, options, mask, "
      "deterministic, heads_like)",
      &whole::attention_backward<Backend>);
}

}  // namespace torchweld
