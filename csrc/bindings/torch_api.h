// The parts of torch that the bindings use, without torch's headers: its tensor classes and its DLPack C exchange API.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/dlpack.h"

namespace torchweld {

namespace py = pybind11;

// Borrowed from a torch.Tensor argument: valid until the bound function returns.
struct TensorView : dlpack::Tensor {
  int64_t size(int dim) const { return shape[dim < 0 ? dim + ndim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dim + ndim : dim]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  // A view of an empty storage has a small address, not null. No system puts memory there.
  bool has_memory() const { return reinterpret_cast<uintptr_t>(data) >= 4096 || numel() == 0; }
};

struct TorchApi {
  PyTypeObject* tensor_type;
  PyTypeObject* parameter_type;
  PyObject* dispatch;  // torch.Tensor.__torch_dispatch__
  const dlpack::ExchangeAPI* exchange;

  static const TorchApi& get() {
    static const TorchApi api = load();
    return api;
  }

  bool is_tensor(PyObject* object) const { return PyObject_TypeCheck(object, tensor_type); }

  // A subclass with its own __torch_dispatch__ (FakeTensor, DTensor, functional tensors) has no memory behind its
  // pointer, and the exchange API would return garbage. The registered op serves such tensors, never a kernel.
  bool is_readable(PyObject* tensor) const {
    if (Py_TYPE(tensor) == tensor_type || Py_TYPE(tensor) == parameter_type) return true;
    return py::type::handle_of(tensor).attr("__torch_dispatch__").ptr() == dispatch;
  }

  TensorView view(PyObject* tensor) const {
    TensorView view;
    if (exchange->tensor_from_py_object(tensor, &view) != 0) throw py::error_already_set();
    return view;
  }

 private:
  static TorchApi load() {
    py::object type = py::module_::import("torch").attr("Tensor");
    if (!py::hasattr(type, "__dlpack_c_exchange_api__"))
      throw py::import_error("torchweld needs torch >= 2.10: torch.Tensor has no __dlpack_c_exchange_api__");
    auto capsule = type.attr("__dlpack_c_exchange_api__").cast<py::capsule>();
    auto* exchange =
        static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (exchange == nullptr) throw py::error_already_set();
    while (exchange->major != 1 && exchange->previous != nullptr) exchange = exchange->previous;
    if (exchange->major != 1)
      throw py::import_error("torchweld speaks DLPack 1, this torch offers only version " +
                             std::to_string(exchange->major));
    py::object parameter = py::module_::import("torch.nn").attr("Parameter");
    py::object dispatch = type.attr("__torch_dispatch__");
    return {reinterpret_cast<PyTypeObject*>(type.release().ptr()),
            reinterpret_cast<PyTypeObject*>(parameter.release().ptr()), dispatch.release().ptr(), exchange};
  }
};

// float32 memory from torch's own allocator. On a GPU it belongs to the current stream, so kernels launched before it
// is freed may still use it.
class Workspace {
 public:
  Workspace(dlpack::Device device, int64_t size) {
    if (size == 0) return;
    dlpack::Tensor prototype{nullptr, device, 1, {dlpack::kFloat, 32, 1}, &size, nullptr, 0};
    auto ignore = [](void*, const char*, const char*) {};
    if (TorchApi::get().exchange->managed_tensor_allocator(&prototype, &memory_, nullptr, ignore) == 0) return;
    // torch.empty raises torch's own error.
    py::object torch = py::module_::import("torch");
    const std::string name = (device.type == dlpack::kCUDA ? "cuda:" : "cpu:") + std::to_string(device.index);
    tensor_ = torch.attr("empty")(size, py::arg("dtype") = torch.attr("float32"), py::arg("device") = name);
  }
  ~Workspace() {
    if (memory_ != nullptr) memory_->deleter(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  float* data() const {
    if (memory_ != nullptr) return static_cast<float*>(memory_->tensor.data);
    return tensor_ ? static_cast<float*>(TorchApi::get().view(tensor_.ptr()).data) : nullptr;
  }

 private:
  dlpack::ManagedTensor* memory_ = nullptr;
  py::object tensor_;
};

}  // namespace torchweld
