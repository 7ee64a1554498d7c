// Whole calls: the arguments of a public op in, its output out, in one crossing from Python. A small call costs mostly
// the way to its kernel, and this way is the shortest.
//
// A whole call serves the common call alone: plain tensors in this device's memory, arguments of the expected types,
// and nothing that watches or transforms torch's operators. For any other it returns None before it has touched
// anything; the op's Python function then makes all checks, and raises all errors. Where autograd must record the call,
// it returns True: the arguments are checked, the Python function makes the node.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "bindings/cross_entropy.h"
#include "bindings/tensor.h"

namespace torchweld {

// Any Python object, looked at by the function that takes it.
struct Object {
  PyObject* source;
};

template <>
struct Reader<Object> {
  static std::string expected() { return "an object"; }
  bool load(PyObject* object) {
    source = object;
    return true;
  }
  Object get() const { return {source}; }

  PyObject* source = nullptr;
};

// The parts of torch that a whole call uses, and the objects that decide whether a call is common.
class Surroundings {
 public:
  static Surroundings& get() {
    static Surroundings& found = *new Surroundings;  // lives as long as the process
    return found;
  }

  // watchers: functions without arguments, true where something watches or transforms torch's operators;
  // forward_mode: the module whose `_current_level` is at least 0 in forward mode; kernels: which module serves a
  // device; settings: `forced` is the name of a backend or None, once `loaded` is true.
  void set(const py::tuple& watchers, py::object forward_mode, py::dict kernels, py::object settings) {
    watchers_.clear();
    for (const py::handle watcher : watchers) watchers_.push_back(py::reinterpret_borrow<py::object>(watcher));
    forward_mode_ = std::move(forward_mode);
    kernels_ = std::move(kernels);
    settings_ = std::move(settings);
  }

  // Whether nothing watches or transforms operators, and this module's kernels are those that serve the CPU.
  bool are_plain() const {
    if (!kernels_ || PyDict_GetItemWithError(kernels_.ptr(), cpu_.ptr()) != module_.ptr()) return false;
    for (const py::object& watcher : watchers_)
      if (is_true(call(watcher))) return false;
    if (!attribute(settings_, loaded_).is(py::bool_(true))) return false;
    const py::object forced = attribute(settings_, forced_);
    if (!forced.is_none() && PyUnicode_CompareWithASCIIString(forced.ptr(), "cpu") != 0) return false;
    return PyLong_AsLong(attribute(forward_mode_, level_).ptr()) < 0;
  }

  bool grad_is_enabled() const { return is_true(call(grad_is_enabled_)); }
  bool autocast_is_on() const { return is_true(checked(PyObject_CallOneArg(autocast_is_on_.ptr(), cpu_.ptr()))); }
  bool requires_grad(PyObject* tensor) const { return is_true(attribute(tensor, requires_grad_)); }

  // A view whose elements torch negates when it reads them.
  bool is_negated(PyObject* tensor) const { return is_true(checked(PyObject_CallMethodNoArgs(tensor, is_neg_.ptr()))); }

  py::object empty_like(PyObject* tensor) const { return checked(PyObject_CallOneArg(empty_like_.ptr(), tensor)); }

  // A tensor without dimensions, of the dtype of `tensor`, or of float32. Naming the dtype costs 0.5 us.
  py::object number_beside(PyObject* tensor, bool in_float32) const {
    PyObject* const args[] = {tensor, no_sizes_.ptr(), float32_.ptr()};
    return checked(PyObject_VectorcallMethod(new_empty_.ptr(), args, 2, in_float32 ? dtype_.ptr() : nullptr));
  }

 private:
  Surroundings() {
    const py::module_ torch = py::module_::import("torch");
    module_ = py::module_::import("torchweld._cpu");
    grad_is_enabled_ = torch.attr("is_grad_enabled");
    autocast_is_on_ = torch.attr("is_autocast_enabled");
    empty_like_ = torch.attr("empty_like");
    float32_ = torch.attr("float32");
    dtype_ = py::make_tuple("dtype");
  }

  static py::object checked(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
  static py::object call(const py::object& function) { return checked(PyObject_CallNoArgs(function.ptr())); }
  static py::object attribute(py::handle object, const py::str& name) {
    return checked(PyObject_GetAttr(object.ptr(), name.ptr()));
  }
  static bool is_true(const py::object& object) { return PyObject_IsTrue(object.ptr()) != 0; }
  static py::str interned(const char* text) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text)); }

  std::vector<py::object> watchers_;
  py::object kernels_, module_, forward_mode_, settings_, grad_is_enabled_, autocast_is_on_, empty_like_, float32_,
      dtype_;
  py::tuple no_sizes_;
  py::str cpu_ = interned("cpu"), loaded_ = interned("loaded"), forced_ = interned("forced");
  py::str level_ = interned("_current_level"), requires_grad_ = interned("requires_grad");
  py::str is_neg_ = interned("is_neg"), new_empty_ = interned("new_empty");
};

// The tensors of one whole call.
class CommonTensors {
 public:
  // Whether `object` is a plain tensor with memory on the CPU; sets `view`, which is valid while the tensor lives.
  bool reads(Object object, TensorView& view) {
    const auto& api = TorchApi::get();
    PyObject* tensor = object.source;
    if (Py_TYPE(tensor) != api.tensor_type && Py_TYPE(tensor) != api.parameter_type) return false;
    if (api.exchange->tensor_from_py_object(tensor, &view) != 0) {
      PyErr_Clear();  // DLPack cannot express it
      return false;
    }
    if (view.device.type != dlpack::kCPU || !view.has_memory() || surroundings_.is_negated(tensor)) return false;
    wants_grad_ = wants_grad_ || surroundings_.requires_grad(tensor);
    return true;
  }

  // Whether autograd must record the call.
  bool want_grad() const { return wants_grad_ && surroundings_.grad_is_enabled(); }

  static bool are_neighbours(const TensorView& t) {
    int64_t expected = 1;
    for (int d = t.ndim - 1; d >= 0; expected *= t.shape[d--])
      if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    return expected > 0;
  }

  static void* data(const TensorView& t) { return static_cast<char*>(t.data) + t.byte_offset; }

  static TensorView made(const py::object& tensor) { return TorchApi::get().view(tensor.ptr()); }

 private:
  const Surroundings& surroundings_ = Surroundings::get();
  bool wants_grad_ = false;
};

namespace whole {

// Runs `kernel` into an output like `input`.
template <class Backend, class Params>
py::object elementwise(void (*Backend::Kernels::*kernel)(const Params&), Params& p, const TensorView& like,
                       PyObject* input) {
  py::object output = Surroundings::get().empty_like(input);
  p.output = CommonTensors::data(CommonTensors::made(output));
  Backend::run(kernel, p, like.device.index);
  return output;
}

template <class Backend>
py::object gelu(Object input, Object approximate) {
  CommonTensors tensors;
  TensorView x;
  if (!PyUnicode_Check(approximate.source) || !Surroundings::get().are_plain() || !tensors.reads(input, x))
    return py::none();
  const bool exact = PyUnicode_CompareWithASCIIString(approximate.source, "none") == 0;
  if (!exact && PyUnicode_CompareWithASCIIString(approximate.source, "tanh") != 0) return py::none();
  const auto dtype = dtype_of(x.dtype);
  if (!dtype || !CommonTensors::are_neighbours(x)) return py::none();
  if (tensors.want_grad()) return py::bool_(true);
  GeluForwardParams p{};
  p.numel = x.numel();
  p.exact = exact;
  p.dtype = *dtype;
  p.input = CommonTensors::data(x);
  return elementwise<Backend>(&Backend::Kernels::gelu_forward, p, x, input.source);
}

// Sets `data` to a parameter's elements: `cols` of them in the activations' dtype, side by side; None has none.
inline bool reads_parameter(CommonTensors& tensors, Object parameter, const TensorView& x, int64_t cols,
                            const void*& data) {
  if (parameter.source == Py_None) return true;
  TensorView view;
  if (!tensors.reads(parameter, view) || view.ndim != 1 || view.shape[0] != cols || view.dtype.code != x.dtype.code ||
      view.dtype.bits != x.dtype.bits || !CommonTensors::are_neighbours(view))
    return false;
  data = CommonTensors::data(view);
  return true;
}

// The norm over the last dimension, which `normalized_shape` gives as a tuple of one integer.
template <class Backend>
py::object norm(Object input, Object normalized_shape, Object weight, Object bias, double eps, bool centred,
                float weight_offset) {
  CommonTensors tensors;
  TensorView x;
  LayerNormForwardParams p{};
  PyObject* shape = normalized_shape.source;
  if (!PyTuple_CheckExact(shape) || PyTuple_GET_SIZE(shape) != 1 || !PyLong_CheckExact(PyTuple_GET_ITEM(shape, 0)) ||
      !Surroundings::get().are_plain() || !tensors.reads(input, x))
    return py::none();
  const auto dtype = dtype_of(x.dtype);
  p.cols = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, 0));
  if (p.cols == -1) PyErr_Clear();
  if (!dtype || !CommonTensors::are_neighbours(x) || x.ndim < 1 || x.size(-1) != p.cols ||
      !reads_parameter(tensors, weight, x, p.cols, p.weight) || !reads_parameter(tensors, bias, x, p.cols, p.bias))
    return py::none();
  if (tensors.want_grad()) return py::bool_(true);
  p.rows = x.numel() / p.cols;
  p.eps = static_cast<float>(eps);
  p.centred = centred;
  p.weight_offset = weight_offset;
  p.dtype = p.weight_dtype = p.sum_dtype = *dtype;
  p.input = CommonTensors::data(x);
  return elementwise<Backend>(&Backend::Kernels::layer_norm_forward, p, x, input.source);
}

// The losses of all rows summed in float64, as their rounding errors may all be equal; "mean": over those that count.
inline double reduced(const CrossEntropyForwardParams& p, bool mean) {
  double sum = 0;
  int64_t rows = 0;
  for (int64_t m = 0; m < p.rows; ++m) {
    sum += p.loss[m];
    rows += p.target[m] != p.ignore_index;
  }
  return mean ? sum / static_cast<double>(rows) : sum;
}

// A float32 rounded to bfloat16: to nearest, ties to even.
inline uint16_t bfloat16_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The loss in the dtype of the logits, but in float32 under autocast and beside float16.
template <class Backend>
py::object cross_entropy(Object logits, Object target, Object ignore_index, Object reduction, Object smoothing) {
  CommonTensors tensors;
  TensorView x, classes;
  CrossEntropyForwardParams p{};
  if (!PyUnicode_Check(reduction.source) || !PyLong_CheckExact(ignore_index.source) ||
      !PyFloat_CheckExact(smoothing.source) || !Surroundings::get().are_plain() || !tensors.reads(logits, x) ||
      !tensors.reads(target, classes))
    return py::none();
  const bool mean = PyUnicode_CompareWithASCIIString(reduction.source, "mean") == 0;
  if (!mean && PyUnicode_CompareWithASCIIString(reduction.source, "sum") != 0) return py::none();
  const auto dtype = dtype_of(x.dtype);
  const bool indices = classes.dtype.code == dlpack::kInt && classes.dtype.bits == 64 && classes.ndim == 1;
  if (!dtype || !indices || x.ndim != 2 || x.shape[0] != classes.shape[0] || !CommonTensors::are_neighbours(x) ||
      !CommonTensors::are_neighbours(classes))
    return py::none();
  p.smoothing = static_cast<float>(PyFloat_AS_DOUBLE(smoothing.source));
  p.ignore_index = PyLong_AsLongLong(ignore_index.source);
  if (PyErr_Occurred() != nullptr) {  // more than 64 bits
    PyErr_Clear();
    return py::none();
  }
  if (!(p.smoothing >= 0 && p.smoothing <= 1)) return py::none();
  if (tensors.want_grad()) return py::bool_(true);
  p.rows = x.shape[0];
  p.classes = x.shape[1];
  p.dtype = *dtype;
  p.logits = CommonTensors::data(x);
  p.target = static_cast<const int64_t*>(CommonTensors::data(classes));
  check_classes("cross_entropy", p);
  std::vector<float> rows(3 * p.rows);
  p.loss = rows.data();
  p.max = p.loss + p.rows;
  p.sum = p.max + p.rows;
  Backend::run(&Backend::Kernels::cross_entropy_forward, p, x.device.index);
  const auto& surroundings = Surroundings::get();
  const bool in_bfloat16 = p.dtype == DType::bfloat16 && !surroundings.autocast_is_on();
  py::object loss = surroundings.number_beside(logits.source, p.dtype != DType::float32 && !in_bfloat16);
  void* data = CommonTensors::data(CommonTensors::made(loss));
  const auto value = static_cast<float>(reduced(p, mean));
  if (in_bfloat16)
    *static_cast<uint16_t*>(data) = bfloat16_of(value);
  else
    *static_cast<float*>(data) = value;
  return loss;
}

}  // namespace whole

template <class Backend>
void bind_whole_calls(Module& m) {
  m.def("allow_whole_calls(watchers, forward_mode, kernels, settings)",
        [](Object watchers, Object forward_mode, Object kernels, Object settings) {
          if (!PyTuple_Check(watchers.source) || !PyDict_Check(kernels.source))
            throw py::type_error("[allow_whole_calls] watchers, kernels: expected a tuple and a dict, but got others");
          const auto borrowed = [](Object object) { return py::reinterpret_borrow<py::object>(object.source); };
          Surroundings::get().set(borrowed(watchers), borrowed(forward_mode), borrowed(kernels), borrowed(settings));
        });
  m.def("whole_gelu(input, approximate)", &whole::gelu<Backend>);
  m.def("whole_layer_norm(input, normalized_shape, weight, bias, eps)",
        [](Object input, Object normalized_shape, Object weight, Object bias, Object eps) {
          if (!PyFloat_CheckExact(eps.source)) return py::object(py::none());
          return whole::norm<Backend>(input, normalized_shape, weight, bias, PyFloat_AS_DOUBLE(eps.source), true, 0);
        });
  m.def("whole_rms_norm(input, normalized_shape, weight, eps)",
        [](Object input, Object normalized_shape, Object weight, Object eps) {
          const bool given = eps.source != Py_None;
          if (given && !PyFloat_CheckExact(eps.source)) return py::object(py::none());
          const double value = given ? PyFloat_AS_DOUBLE(eps.source) : std::numeric_limits<float>::epsilon();
          return whole::norm<Backend>(input, normalized_shape, weight, Object{Py_None}, value, false, 0);
        });
  m.def("whole_cross_entropy(input, target, ignore_index, reduction, label_smoothing)", &whole::cross_entropy<Backend>);
}

}  // namespace torchweld
