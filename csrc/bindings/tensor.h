// torch.Tensor -> TensorView without torch's headers: a pybind11 type caster over the DLPack C exchange API, and the
// checks that stand between Python and a kernel. Order of the checks: device, dtype, layout, shape; every message names
// the op, the argument, what was expected and what came.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "params.h"

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

  // A subclass with a __torch_dispatch__ of its own (FakeTensor, DTensor, functional tensors) has no memory behind its
  // pointer: the exchange API would hand over garbage. Such tensors belong to the registered op, never to a kernel.
  bool has_memory(PyObject* tensor) const {
    if (Py_TYPE(tensor) == tensor_type || Py_TYPE(tensor) == parameter_type) return true;
    return py::type::handle_of(tensor).attr("__torch_dispatch__").ptr() == dispatch;
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

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return "float32";
    case DType::bfloat16:
      return "bfloat16";
    case DType::float16:
      return "float16";
  }
  return "unknown";
}

inline std::string name_of(dlpack::DataType t) {
  const char* kind = t.code == dlpack::kInt      ? "int"
                     : t.code == dlpack::kUInt   ? "uint"
                     : t.code == dlpack::kFloat  ? "float"
                     : t.code == dlpack::kBfloat ? "bfloat"
                     : t.code == dlpack::kBool   ? "bool"
                                                 : "type";
  return kind + std::to_string(t.bits);
}

inline std::optional<DType> dtype_of(dlpack::DataType t) {
  if (t.code == dlpack::kFloat && t.bits == 32) return DType::float32;
  if (t.code == dlpack::kFloat && t.bits == 16) return DType::float16;
  if (t.code == dlpack::kBfloat && t.bits == 16) return DType::bfloat16;
  return std::nullopt;
}

// The arguments of one call: names them in errors, holds them all to one device.
class Arguments {
 public:
  Arguments(const char* op, dlpack::DeviceType device, const TensorView& first)
      : op_(op), device_{device, first.device.index} {}

  DType dtype(const TensorView& t, const char* name) const {
    if (auto dtype = dtype_of(t.dtype)) return *dtype;
    fail(name, "dtype float32, bfloat16 or float16", name_of(t.dtype));
  }

  // Pointer to a contiguous tensor of this dtype and shape.
  void* contiguous(const TensorView& t, const char* name, DType dtype, std::initializer_list<int64_t> shape) const {
    void* data = dense(t, name, dtype);
    check_shape(t, name, shape);
    return data;
  }

  // Pointer to a contiguous tensor of this dtype and number of elements, whatever its shape.
  void* flat(const TensorView& t, const char* name, DType dtype, int64_t numel) const {
    void* data = dense(t, name, dtype);
    if (t.numel() != numel) fail(name, std::to_string(numel) + " elements", "shape " + list(t.shape, t.ndim));
    return data;
  }

  void* flat(const std::optional<TensorView>& t, const char* name, DType dtype, int64_t numel) const {
    return t ? flat(*t, name, dtype, numel) : nullptr;
  }

  // Pointer to a contiguous tensor of this number of signed integers of so many bits.
  void* integers(const TensorView& t, const char* name, int bits, int64_t numel) const {
    check_device(t, name);
    if (t.dtype.code != dlpack::kInt || t.dtype.bits != bits)
      fail(name, "dtype int" + std::to_string(bits), name_of(t.dtype));
    check_contiguous(t, name);
    if (t.numel() != numel) fail(name, std::to_string(numel) + " elements", "shape " + list(t.shape, t.ndim));
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  int64_t* indices(const TensorView& t, const char* name, int64_t numel) const {
    return static_cast<int64_t*>(integers(t, name, 64, numel));
  }

  // Pointer to a tensor of this dtype and shape whose elements along the last dimension are neighbours.
  void* strided(const TensorView& t, const char* name, DType dtype, std::initializer_list<int64_t> shape) const {
    check_device_and_dtype(t, name, dtype);
    if (t.ndim > 0 && t.size(-1) > 1 && t.stride(-1) != 1)
      fail(name, "stride 1 in the last dimension", "strides " + list(t.strides, t.ndim));
    check_shape(t, name, shape);
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  bool is_here(const TensorView& t) const { return on_device(t) && has_memory(t); }

  void check_device(const TensorView& t, const char* name) const {
    if (!on_device(t))
      fail(name, "a tensor on " + device_name(device_), device_name(t.device) + "; move it with .to()");
    if (!has_memory(t))
      fail(name, "a tensor with memory", "one whose storage is empty: it was freed, or is a ZeroTensor");
  }

  // Pointer to a tensor of this shape, of any dtype, which may have stride 0 where it is broadcast.
  void* expanded(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) const {
    check_device(t, name);
    check_shape(t, name, shape);
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  void check_shape(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) const {
    if (std::vector<int64_t>(shape) != std::vector<int64_t>(t.shape, t.shape + t.ndim))
      fail(name, "shape " + list(shape.begin(), static_cast<int>(shape.size())), list(t.shape, t.ndim));
  }

  [[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) const {
    throw py::value_error("[" + std::string(op_) + "] " + name + ": expected " + expected + ", but got " + got);
  }

  static std::string list(const int64_t* values, int n) {
    std::string text = "(";
    for (int i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + ")";
  }

 private:
  bool on_device(const TensorView& t) const { return t.device.type == device_.type && t.device.index == device_.index; }

  // A view of an empty storage starts a little past null, where no system puts memory.
  static bool has_memory(const TensorView& t) { return reinterpret_cast<uintptr_t>(t.data) >= 4096 || t.numel() == 0; }

  void check_device_and_dtype(const TensorView& t, const char* name, DType dtype) const {
    check_device(t, name);
    if (dtype_of(t.dtype) != dtype) fail(name, std::string("dtype ") + name_of(dtype), name_of(t.dtype));
  }

  void* dense(const TensorView& t, const char* name, DType dtype) const {
    check_device_and_dtype(t, name, dtype);
    check_contiguous(t, name);
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  void check_contiguous(const TensorView& t, const char* name) const {
    int64_t expected = 1;
    for (int d = t.ndim - 1; d >= 0; expected *= t.shape[d--])
      if (t.shape[d] > 1 && t.strides[d] != expected && t.numel() > 0)
        fail(name, "a contiguous tensor (call .contiguous())", "strides " + list(t.strides, t.ndim));
  }

  static std::string device_name(dlpack::Device d) {
    std::string kind = d.type == dlpack::kCPU    ? "cpu"
                       : d.type == dlpack::kCUDA ? "cuda"
                                                 : "device type " + std::to_string(d.type);
    return d.type == dlpack::kCPU ? kind : kind + ":" + std::to_string(d.index);
  }

  const char* op_;
  dlpack::Device device_;
};

}  // namespace torchweld

namespace pybind11::detail {

template <>
struct type_caster<torchweld::TensorView> {
  PYBIND11_TYPE_CASTER(torchweld::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    const auto& api = torchweld::TorchApi::get();
    if (!PyObject_TypeCheck(source.ptr(), api.tensor_type)) return false;
    if (!api.has_memory(source.ptr()))
      throw type_error(std::string("a ") + Py_TYPE(source.ptr())->tp_name +
                       " has no memory of its own; call the function in torchweld.ops, which dispatches it");
    if (api.exchange->tensor_from_py_object(source.ptr(), &value) != 0) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
