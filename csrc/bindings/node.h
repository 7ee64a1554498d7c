// Nodes of autograd in C++: forward and backward of a torch.autograd.Function. Each is one crossing from torch: outputs
// are allocated and the kernel is run without a frame of Python.
//
// A node has a Python class of the same meaning, its `definition`. It serves the calls that are not common
// (common_call.h), with the same arguments. What watches torch's operators was asked before a forward.
#pragma once

#include "bindings/whole_call.h"

namespace torchweld {
namespace node {

// Attributes of torch's context `ctx`, and those that the nodes keep there.
struct Names {
  static const Names& get() {
    static const Names& found = *new Names;  // lives as long as the process
    return found;
  }

  py::str definition = interned("definition"), forward = interned("forward"), gradients = interned("gradients");
  py::str save_for_backward = interned("save_for_backward"), saved_tensors = interned("saved_tensors");
  py::str needs_input_grad = interned("needs_input_grad");
  py::str exact = interned("exact"), norm = interned("norm"), ignore_index = interned("ignore_index");
  py::str smoothing = interned("smoothing"), reduction = interned("reduction"), rows = interned("rows");
  py::str options = interned("options"), deterministic = interned("deterministic"), heads_like = interned("heads_like");
};

inline py::object attribute(PyObject* object, const py::str& name) {
  return checked(PyObject_GetAttr(object, name.ptr()));
}

// `ctx.method(*args)`, or the static method of a class.
template <class... Args>
py::object call(PyObject* object, const py::str& method, Args... args) {
  PyObject* const all[] = {object, args...};
  return checked(PyObject_VectorcallMethod(method.ptr(), all, 1 + sizeof...(args), nullptr));
}

// What torch keeps for a node between its forward and its backward, and the node's definition.
class Context {
 public:
  explicit Context(Object ctx) : ctx_(ctx.source) {}

  py::object get(const py::str& name) const { return attribute(ctx_, name); }
  void set(const py::str& name, PyObject* value) const {
    if (PyObject_SetAttr(ctx_, name.ptr(), value) != 0) throw py::error_already_set();
  }
  // An attribute that is a tuple of `count` items, or more.
  py::object items(const py::str& name, Py_ssize_t count) const {
    py::object found = get(name);
    if (!PyTuple_Check(found.ptr()) || PyTuple_GET_SIZE(found.ptr()) < count)
      throw py::type_error(std::string(name) + ": expected a tuple of " + std::to_string(count));
    return found;
  }
  template <class... Args>
  py::object call_definition(const py::str& method, Args... args) const {
    return call(get(names_.definition).ptr(), method, args...);
  }

 protected:
  PyObject* ctx_;
  const Names& names_ = Names::get();
};

class Forward : public Context {
 public:
  using Context::Context;

  template <class... Tensors>
  void save(Tensors... tensors) const {
    call(ctx_, names_.save_for_backward, tensors...);
  }
  template <class... Args>
  py::object by_definition(Args... args) const {
    return call_definition(names_.forward, ctx_, args...);
  }
};

class Backward : public Context {
 public:
  // Reads the saved tensors, `count` of them, once: a checkpoint gives them only once. torch raises where the graph was
  // freed.
  Backward(Object ctx, Py_ssize_t count) : Context(ctx), saved_(items(names_.saved_tensors, count)) {}

  // Whether a kernel may run: nothing watches torch's operators, and the gradients are not differentiated again.
  static bool is_common() { return Surroundings::get().are_plain() && !Surroundings::get().grad_is_enabled(); }

  Object saved(Py_ssize_t i) const { return {PyTuple_GET_ITEM(saved_.ptr(), i)}; }

  py::object by_definition(Object doutput) const {
    return call_definition(names_.gradients, ctx_, saved_.ptr(), doutput.source);
  }

 private:
  py::object saved_;
};

// One entry of `needs_input_grad`.
inline bool wants(const py::object& needed, Py_ssize_t i) { return PyTuple_GET_ITEM(needed.ptr(), i) == Py_True; }

// An empty gradient like `tensor` and its memory; None where it is not wanted.
inline py::object gradient_like(bool wanted, Object tensor, void*& data) {
  if (!wanted || tensor.source == Py_None) return py::none();
  py::object gradient = Surroundings::get().empty_like(tensor.source);
  data = CommonTensors::data(CommonTensors::made(gradient));
  return gradient;
}

// ---- GELU

template <class Backend>
py::object gelu_forward(Object ctx, Object input, Object exact) {
  const Forward node(ctx);
  py::object output = whole::gelu_of<Backend>(CommonTensors::of_node(), input, exact.source == Py_True);
  if (output.is_none()) return node.by_definition(input.source, exact.source);
  node.save(input.source);
  node.set(Names::get().exact, exact.source);
  return output;
}

// The gradient of the input; None where the call is not common.
template <class Backend>
py::object gelu_gradient(const Backward& node, Object doutput, Object input) {
  CommonTensors tensors = CommonTensors::of_node();
  TensorView dy, x;
  if (!Backward::is_common() || !tensors.reads(doutput, dy) || !tensors.reads(input, x)) return py::none();
  const auto dtype = dtype_of(x.dtype);
  if (!dtype || !CommonTensors::are_alike(x, dy)) return py::none();
  GeluBackwardParams p{};
  py::object dinput = gradient_like(true, input, p.dinput);
  p.numel = x.numel();
  p.exact = node.get(Names::get().exact).is(py::bool_(true));
  p.dtype = *dtype;
  p.doutput = CommonTensors::data(dy);
  p.input = CommonTensors::data(x);
  Backend::run(&Backend::Kernels::gelu_backward, p, x.device.index);
  return dinput;
}

template <class Backend>
py::object gelu_backward(Object ctx, Object doutput) {
  const Backward node(ctx, 1);
  py::object dinput = gelu_gradient<Backend>(node, doutput, node.saved(0));
  return dinput.is_none() ? node.by_definition(doutput) : py::make_tuple(dinput, py::none());
}

// ---- Layer norm and RMS norm

template <class Backend>
py::object norm_forward(Object ctx, Object input, Object weight, Object bias, Object norm) {
  const Forward node(ctx);
  CommonTensors tensors = CommonTensors::of_node();
  TensorView x;
  LayerNormForwardParams p{};
  if (!whole::reads_rows(tensors, input, read<Norm>(norm.source), x, p) ||
      !whole::reads_parameter(tensors, weight, x, p.cols, p.weight) ||
      !whole::reads_parameter(tensors, bias, x, p.cols, p.bias))
    return node.by_definition(input.source, weight.source, bias.source, norm.source);
  py::object stats = Surroundings::floats(x.device, {1 + p.centred, p.rows});
  set_stats(p, static_cast<float*>(CommonTensors::data(CommonTensors::made(stats))));
  p.input = CommonTensors::data(x);
  py::object output = whole::elementwise<Backend>(&Backend::Kernels::layer_norm_forward, p, x, input.source);
  node.save(input.source, weight.source, bias.source, stats.ptr());
  node.set(Names::get().norm, norm.source);
  return output;
}

// Gradients of input, weight, bias and norm; None where the call is not common.
template <class Backend>
py::object norm_gradients(const Backward& node, Object doutput, Object input, Object weight, Object bias,
                          Object stats) {
  CommonTensors tensors = CommonTensors::of_node();
  TensorView dy, x, rows;
  LayerNormBackwardParams p{};
  const void* ignored = nullptr;
  const py::object norm = node.get(Names::get().norm);
  if (!Backward::is_common() || !whole::reads_rows(tensors, input, read<Norm>(norm.ptr()), x, p) ||
      !tensors.reads(doutput, dy) || !CommonTensors::are_alike(x, dy) || !tensors.reads(stats, rows) ||
      !whole::reads_parameter(tensors, weight, x, p.cols, p.weight) ||
      !whole::reads_parameter(tensors, bias, x, p.cols, ignored))
    return py::none();
  set_stats(Arguments("layer_norm_backward", Backend::device, x), p, rows);
  p.input = CommonTensors::data(x);
  p.doutput = CommonTensors::data(dy);
  const py::object wanted = node.items(Names::get().needs_input_grad, 3);  // of input, weight, bias
  py::object dinput = gradient_like(wants(wanted, 0), input, p.dinput);
  py::object dweight = gradient_like(wants(wanted, 1), weight, p.dweight);
  py::object dbias = gradient_like(wants(wanted, 2), bias, p.dbias);
  const bool weights = p.dweight != nullptr || p.dbias != nullptr;
  p.blocks = Backend::layer_norm_workspace(p.rows, p.cols, weights, x.device.index);
  const Workspace partial(x.device, p.blocks * 2 * p.cols);
  p.partial = partial.data();
  Backend::run(&Backend::Kernels::layer_norm_backward, p, x.device.index);
  return py::make_tuple(dinput, dweight, dbias, py::none());
}

template <class Backend>
py::object norm_backward(Object ctx, Object doutput) {
  const Backward node(ctx, 4);
  py::object gradients =
      norm_gradients<Backend>(node, doutput, node.saved(0), node.saved(1), node.saved(2), node.saved(3));
  return gradients.is_none() ? node.by_definition(doutput) : gradients;
}

// ---- Cross-entropy, reduced

// dtype: that of the loss.
template <class Backend>
py::object cross_entropy_forward(Object ctx, Object logits, Object target, Object ignore_index, Object smoothing,
                                 Object reduction, Object dtype) {
  const Forward node(ctx);
  whole::Losses losses;
  if (!losses.reads(logits, target, ignore_index, reduction, smoothing))
    return node.by_definition(logits.source, target.source, ignore_index.source, smoothing.source, reduction.source,
                              dtype.source);
  py::object stats = Surroundings::floats(losses.logits.device, {2, losses.p.rows});
  py::object loss =
      losses.reduced<Backend>(logits, static_cast<float*>(CommonTensors::data(CommonTensors::made(stats))));
  const Names& names = Names::get();
  node.save(logits.source, target.source, stats.ptr(), Py_None);
  node.set(names.ignore_index, ignore_index.source);
  node.set(names.smoothing, smoothing.source);
  node.set(names.reduction, reduction.source);
  node.set(names.rows, py::int_(losses.mean ? losses.rows_that_count() : int64_t{1}).ptr());
  return losses.p.dtype == DType::float16 ? loss.attr("to")(py::handle(dtype.source)) : loss;
}

// dlogits of a loss that is reduced: dloss has one element, and each row's part of it is dloss / rows.
template <class Backend>
py::object cross_entropy_gradient(const Backward& node, Object dloss, Object logits, Object target, Object stats) {
  CommonTensors tensors = CommonTensors::of_node();
  TensorView dy, x, classes, found;
  const Names& names = Names::get();
  const py::object rows = node.get(names.rows);
  if (!Backward::is_common() || rows.is_none() || !tensors.reads(dloss, dy) || !tensors.reads(logits, x) ||
      !tensors.reads(target, classes) || !tensors.reads(stats, found))
    return py::none();
  const auto dtype = dtype_of(x.dtype), scalar = dtype_of(dy.dtype);
  if (!dtype || !scalar || dy.ndim != 0 || x.ndim != 2 || !CommonTensors::are_neighbours(x)) return py::none();
  py::object single;
  if (scalar != DType::float32) {
    single = py::reinterpret_borrow<py::object>(dloss.source).attr("float")();
    dy = CommonTensors::made(single);
  }
  const Arguments args("cross_entropy_backward", Backend::device, x);
  CrossEntropyBackwardParams p{};
  p.rows = x.size(0);
  p.classes = x.size(1);
  p.ignore_index = read<int64_t>(node.get(names.ignore_index).ptr());
  p.smoothing = read<float>(node.get(names.smoothing).ptr());
  p.dtype = *dtype;
  const double whole = *static_cast<const float*>(CommonTensors::data(dy));
  const std::vector<float> by_row(p.rows, static_cast<float>(whole / static_cast<double>(read<int64_t>(rows.ptr()))));
  p.dloss = by_row.data();
  p.logits = CommonTensors::data(x);
  p.target = args.indices(classes, "target", p.rows);
  p.max = static_cast<const float*>(args.contiguous(found, "stats", DType::float32, {2, p.rows}));
  p.sum = p.max + p.rows;
  py::object dlogits = gradient_like(true, logits, p.dlogits);
  Backend::run(&Backend::Kernels::cross_entropy_backward, p, x.device.index);
  return dlogits;
}

template <class Backend>
py::object cross_entropy_backward(Object ctx, Object dloss) {
  const Backward node(ctx, 4);
  py::object dlogits = cross_entropy_gradient<Backend>(node, dloss, node.saved(0), node.saved(1), node.saved(2));
  if (dlogits.is_none()) return node.by_definition(dloss);
  return py::make_tuple(dlogits, py::none(), py::none(), py::none(), py::none(), py::none());
}

}  // namespace node

template <class Backend>
void bind_nodes(Module& m) {
  m.def(
      "method(function)", [](Object function) { return checked(PyInstanceMethod_New(function.source)); },
      "A function of this module as a method of a class: an instance is its first argument.");
  m.def("node_gelu_forward(ctx, input, exact)", &node::gelu_forward<Backend>);
  m.def("node_gelu_backward(ctx, doutput)", &node::gelu_backward<Backend>);
  m.def("node_layer_norm_forward(ctx, input, weight, bias, norm)", &node::norm_forward<Backend>);
  m.def("node_layer_norm_backward(ctx, doutput)", &node::norm_backward<Backend>);
  m.def("node_cross_entropy_forward(ctx, logits, target, ignore_index, smoothing, reduction, dtype)",
        &node::cross_entropy_forward<Backend>);
  m.def("node_cross_entropy_backward(ctx, dloss)", &node::cross_entropy_backward<Backend>);
}

}  // namespace torchweld
