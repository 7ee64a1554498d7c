// What makes a call common, and what a call that is common may use of torch without its headers.
//
// A common call has plain tensors in this device's memory, arguments of the expected types, and nothing that watches or
// transforms torch's operators. The functions of whole_call.h and node.h serve common calls alone. Any other they leave
// to the op's Python code before they have touched anything: it makes all checks and raises all errors.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

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

  // A tensor of float32 in the layout of `tensor`.
  py::object floats_like(PyObject* tensor) const {
    PyObject* const args[] = {tensor, float32_.ptr()};
    return checked(PyObject_Vectorcall(empty_like_.ptr(), args, 1, dtype_.ptr()));
  }

  // A tensor of float32, by torch's allocator; this takes half as long as torch.empty.
  static py::object floats(dlpack::Device device, std::initializer_list<int64_t> sizes) {
    dlpack::Tensor prototype{nullptr,
                             device,
                             static_cast<int32_t>(sizes.size()),
                             {dlpack::kFloat, 32, 1},
                             const_cast<int64_t*>(sizes.begin()),
                             nullptr,
                             0};
    auto ignore = [](void*, const char*, const char*) {};
    const auto* exchange = TorchApi::get().exchange;
    dlpack::ManagedTensor* memory = nullptr;
    if (exchange->managed_tensor_allocator(&prototype, &memory, nullptr, ignore) != 0)
      throw py::buffer_error("torch's allocator has no memory for " + std::to_string(*sizes.begin()) + " rows");
    void* tensor = nullptr;
    if (exchange->managed_tensor_to_py_object(memory, &tensor) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
  }

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

  static py::object call(const py::object& function) { return checked(PyObject_CallNoArgs(function.ptr())); }
  static py::object attribute(py::handle object, const py::str& name) {
    return checked(PyObject_GetAttr(object.ptr(), name.ptr()));
  }
  static bool is_true(const py::object& object) { return PyObject_IsTrue(object.ptr()) != 0; }

  std::vector<py::object> watchers_;
  py::object kernels_, module_, forward_mode_, settings_, grad_is_enabled_, autocast_is_on_, empty_like_, float32_,
      dtype_;
  py::tuple no_sizes_;
  py::str cpu_ = interned("cpu"), loaded_ = interned("loaded"), forced_ = interned("forced");
  py::str level_ = interned("_current_level"), requires_grad_ = interned("requires_grad");
  py::str is_neg_ = interned("is_neg"), new_empty_ = interned("new_empty");
};

// The tensors of one whole call, or of a node, which need not ask which of them want gradients.
class CommonTensors {
 public:
  static CommonTensors of_node() {
    CommonTensors tensors;
    tensors.asks_for_grad_ = false;
    return tensors;
  }

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
    wants_grad_ = wants_grad_ || (asks_for_grad_ && surroundings_.requires_grad(tensor));
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

  // Whether two tensors have the same dtype, and their elements the same places.
  static bool are_alike(const TensorView& a, const TensorView& b) {
    return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits && a.numel() == b.numel() &&
           are_neighbours(a) && are_neighbours(b);
  }

  static void* data(const TensorView& t) { return static_cast<char*>(t.data) + t.byte_offset; }

  static TensorView made(const py::object& tensor) { return TorchApi::get().view(tensor.ptr()); }

 private:
  const Surroundings& surroundings_ = Surroundings::get();
  bool asks_for_grad_ = true, wants_grad_ = false;
};

}  // namespace torchweld
