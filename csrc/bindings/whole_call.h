// Whole calls: the arguments of a public op in, its output out, in one crossing from Python. A small call costs mostly
// the way to its kernel, and this way is the shortest.
//
// A whole call serves the common call alone (common_call.h). Where autograd must record the call, it returns True: the
// arguments are checked, and the Python function applies the node, whose forward and backward node.h has.
#pragma once

#include <cstring>
#include <limits>
#include <vector>

#include "bindings/common_call.h"
#include "bindings/cross_entropy.h"
#include "bindings/layer_norm.h"

namespace torchweld {
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

// `tensors` tell whether autograd must record the call.
template <class Backend>
py::object gelu_of(CommonTensors tensors, Object input, bool exact) {
  TensorView x;
  if (!tensors.reads(input, x)) return py::none();
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

template <class Backend>
py::object gelu(Object input, Object approximate) {
  if (!PyUnicode_Check(approximate.source)) return py::none();
  const bool exact = PyUnicode_CompareWithASCIIString(approximate.source, "none") == 0;
  if (!exact && PyUnicode_CompareWithASCIIString(approximate.source, "tanh") != 0) return py::none();
  return Surroundings::get().are_plain() ? gelu_of<Backend>(CommonTensors(), input, exact) : py::object(py::none());
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

// Whether `input` is common rows of norm.cols elements; fills what both directions share.
inline bool reads_rows(CommonTensors& tensors, Object input, const Norm& norm, TensorView& x, LayerNormParams& p) {
  if (!tensors.reads(input, x)) return false;
  const auto dtype = dtype_of(x.dtype);
  if (!dtype || !CommonTensors::are_neighbours(x) || norm.cols < 1 || x.numel() % norm.cols != 0) return false;
  p.rows = x.numel() / norm.cols;
  p.cols = norm.cols;
  p.eps = norm.eps;
  p.centred = norm.centred;
  p.weight_offset = norm.weight_offset;
  p.dtype = p.weight_dtype = p.sum_dtype = *dtype;
  return true;
}

// The norm over the last dimension, which `normalized_shape` gives as a tuple of one integer.
template <class Backend>
py::object norm(Object input, Object normalized_shape, Object weight, Object bias, Norm numbers) {
  PyObject* shape = normalized_shape.source;
  if (!PyTuple_CheckExact(shape) || PyTuple_GET_SIZE(shape) != 1 || !PyLong_CheckExact(PyTuple_GET_ITEM(shape, 0)))
    return py::none();
  numbers.cols = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, 0));
  if (numbers.cols == -1) PyErr_Clear();
  CommonTensors tensors;
  TensorView x;
  LayerNormForwardParams p{};
  if (!Surroundings::get().are_plain() || !reads_rows(tensors, input, numbers, x, p) || x.ndim < 1 ||
      x.size(-1) != p.cols || !reads_parameter(tensors, weight, x, p.cols, p.weight) ||
      !reads_parameter(tensors, bias, x, p.cols, p.bias))
    return py::none();
  if (tensors.want_grad()) return py::bool_(true);
  p.input = CommonTensors::data(x);
  return elementwise<Backend>(&Backend::Kernels::layer_norm_forward, p, x, input.source);
}

// The arguments of a common loss.
struct Losses {
  CommonTensors tensors;
  TensorView logits{};
  CrossEntropyForwardParams p{};
  bool mean = false;

  bool reads(Object input, Object target, Object ignore_index, Object reduction, Object smoothing) {
    TensorView classes;
    if (!PyUnicode_Check(reduction.source) || !PyLong_CheckExact(ignore_index.source) ||
        !PyFloat_CheckExact(smoothing.source) || !tensors.reads(input, logits) || !tensors.reads(target, classes))
      return false;
    mean = PyUnicode_CompareWithASCIIString(reduction.source, "mean") == 0;
    if (!mean && PyUnicode_CompareWithASCIIString(reduction.source, "sum") != 0) return false;
    const auto dtype = dtype_of(logits.dtype);
    const bool indices = classes.dtype.code == dlpack::kInt && classes.dtype.bits == 64 && classes.ndim == 1;
    if (!dtype || !indices || logits.ndim != 2 || logits.shape[0] != classes.shape[0] ||
        !CommonTensors::are_neighbours(logits) || !CommonTensors::are_neighbours(classes))
      return false;
    p.smoothing = static_cast<float>(PyFloat_AS_DOUBLE(smoothing.source));
    p.ignore_index = PyLong_AsLongLong(ignore_index.source);
    if (PyErr_Occurred() != nullptr) {  // more than 64 bits
      PyErr_Clear();
      return false;
    }
    p.rows = logits.shape[0];
    p.classes = logits.shape[1];
    p.dtype = *dtype;
    p.logits = CommonTensors::data(logits);
    p.target = static_cast<const int64_t*>(CommonTensors::data(classes));
    return p.smoothing >= 0 && p.smoothing <= 1;
  }

  int64_t rows_that_count() const {
    int64_t rows = 0;
    for (int64_t m = 0; m < p.rows; ++m) rows += p.target[m] != p.ignore_index;
    return rows;
  }

  // Of all rows, in a tensor beside `input`: in the dtype of the logits, but in float32 under autocast and beside
  // float16. Row maxima and sums go to `stats` (2, rows).
  template <class Backend>
  py::object reduced(Object input, float* stats) {
    check_classes("cross_entropy", p);
    std::vector<float> rows(p.rows);
    p.loss = rows.data();
    p.max = stats;
    p.sum = stats + p.rows;
    Backend::run(&Backend::Kernels::cross_entropy_forward, p, logits.device.index);
    double sum = 0;  // in float64, as the rounding errors of all rows may be equal
    for (const float loss : rows) sum += loss;
    const auto value = static_cast<float>(mean ? sum / static_cast<double>(rows_that_count()) : sum);
    const auto& surroundings = Surroundings::get();
    const bool in_bfloat16 = p.dtype == DType::bfloat16 && !surroundings.autocast_is_on();
    py::object result = surroundings.number_beside(input.source, p.dtype != DType::float32 && !in_bfloat16);
    void* data = CommonTensors::data(CommonTensors::made(result));
    if (in_bfloat16)
      *static_cast<uint16_t*>(data) = bfloat16_of(value);
    else
      *static_cast<float*>(data) = value;
    return result;
  }

 private:
  // A float32 rounded to bfloat16: to nearest, ties to even.
  static uint16_t bfloat16_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

template <class Backend>
py::object cross_entropy(Object logits, Object target, Object ignore_index, Object reduction, Object smoothing) {
  Losses losses;
  if (!Surroundings::get().are_plain() || !losses.reads(logits, target, ignore_index, reduction, smoothing))
    return py::none();
  if (losses.tensors.want_grad()) return py::bool_(true);
  std::vector<float> stats(2 * losses.p.rows);
  return losses.reduced<Backend>(logits, stats.data());
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
          return whole::norm<Backend>(input, normalized_shape, weight, bias,
                                      Norm{0, static_cast<float>(PyFloat_AS_DOUBLE(eps.source)), true, 0, 0});
        });
  m.def("whole_rms_norm(input, normalized_shape, weight, eps)",
        [](Object input, Object normalized_shape, Object weight, Object eps) {
          const bool given = eps.source != Py_None;
          if (given && !PyFloat_CheckExact(eps.source)) return py::object(py::none());
          const double value = given ? PyFloat_AS_DOUBLE(eps.source) : std::numeric_limits<float>::epsilon();
          return whole::norm<Backend>(input, normalized_shape, weight, Object{Py_None},
                                      Norm{0, static_cast<float>(value), false, 0, 0});
        });
  m.def("whole_cross_entropy(input, target, ignore_index, reduction, label_smoothing)", &whole::cross_entropy<Backend>);
}

}  // namespace torchweld
