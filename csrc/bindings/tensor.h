// torch.Tensor -> TensorView without torch's headers, by the DLPack C exchange API, and the checks between Python and a
// kernel. The checks have one order: device, dtype, layout, shape. Every message names the op, the argument, what was
// expected and what came.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "bindings/function.h"
#include "params/types.h"

namespace torchweld {

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
  const char* kind = t.code == dlpack::kInt       ? "int"
                     : t.code == dlpack::kUInt    ? "uint"
                     : t.code == dlpack::kFloat   ? "float"
                     : t.code == dlpack::kBfloat  ? "bfloat"
                     : t.code == dlpack::kBool    ? "bool"
                     : t.code == dlpack::kComplex ? "complex"
                     : t.bits == 8                ? "float"
                                                  : "type";
  return t.code == dlpack::kBool ? kind : kind + std::to_string(t.bits);
}

inline std::optional<DType> dtype_of(dlpack::DataType t) {
  if (t.code == dlpack::kFloat && t.bits == 32) return DType::float32;
  if (t.code == dlpack::kFloat && t.bits == 16) return DType::float16;
  if (t.code == dlpack::kBfloat && t.bits == 16) return DType::bfloat16;
  return std::nullopt;
}

// The tensors of one call. Errors name them, and all must be on one device.
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

  // Pointer to a contiguous tensor of `numel` signed integers of `bits` bits.
  void* integers(const TensorView& t, const char* name, int bits, int64_t numel) const {
    return elements(t, name, dlpack::kInt, bits, numel);
  }

  int64_t* indices(const TensorView& t, const char* name, int64_t numel) const {
    return static_cast<int64_t*>(integers(t, name, 64, numel));
  }

  // Pointer to a contiguous tensor of `numel` float64.
  double* doubles(const TensorView& t, const char* name, int64_t numel) const {
    return static_cast<double*>(elements(t, name, dlpack::kFloat, 64, numel));
  }

  // Pointer to a tensor of this dtype and shape whose elements along the last dimension are neighbours.
  void* strided(const TensorView& t, const char* name, DType dtype, std::initializer_list<int64_t> shape) const {
    check_device_and_dtype(t, name, dtype);
    if (t.ndim > 0 && t.size(-1) > 1 && t.stride(-1) != 1 && t.numel() > 0)
      fail(name, "stride 1 in the last dimension", "strides " + list(t.strides, t.ndim));
    check_shape(t, name, shape);
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  bool is_here(const TensorView& t) const { return on_device(t) && t.has_memory(); }

  void check_device(const TensorView& t, const char* name) const {
    if (!on_device(t))
      fail(name, "a tensor on " + device_name(device_), device_name(t.device) + "; move it with .to()");
    if (!t.has_memory())
      fail(name, "a tensor with memory", "one whose storage is empty: it was freed, or is a ZeroTensor");
  }

  // Pointer to a tensor of this shape and any dtype. Broadcast dimensions may have stride 0.
  void* expanded(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) const {
    check_device(t, name);
    check_shape(t, name, shape);
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  void check_shape(const TensorView& t, const char* name, std::initializer_list<int64_t> shape) const {
    if (!std::equal(shape.begin(), shape.end(), t.shape, t.shape + t.ndim))
      fail(name, "shape " + list(shape.begin(), static_cast<int>(shape.size())), list(t.shape, t.ndim));
  }

  [[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) const {
    throw py::value_error("[" + std::string(op_) + "] " + name + ": expected " + expected + ", but got " + got);
  }

  static std::string list(const int64_t* values, int n) {
    std::string text = "[";
    for (int i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + "]";
  }

 private:
  void* elements(const TensorView& t, const char* name, dlpack::TypeCode code, int bits, int64_t numel) const {
    check_device(t, name);
    if (t.dtype.code != code || t.dtype.bits != bits)
      fail(name, "dtype " + name_of(dlpack::DataType{code, static_cast<uint8_t>(bits), 1}), name_of(t.dtype));
    check_contiguous(t, name);
    if (t.numel() != numel) fail(name, std::to_string(numel) + " elements", "shape " + list(t.shape, t.ndim));
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  bool on_device(const TensorView& t) const { return t.device.type == device_.type && t.device.index == device_.index; }

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

// `load` only looks at the type of a tensor, which the caller of the bound function keeps alive. A tensor that DLPack
// cannot read raises BufferError. The callers of the kernels then call torch's dispatcher.
template <>
struct Reader<TensorView> {
  static std::string expected() { return "a torch.Tensor"; }

  bool load(PyObject* tensor) {
    const auto& api = TorchApi::get();
    if (!api.is_tensor(tensor)) return false;
    if (!api.is_readable(tensor))
      throw py::buffer_error(std::string("a ") + Py_TYPE(tensor)->tp_name +
                             " has no memory of its own; call the function in torchweld.ops, which dispatches it");
    source = tensor;
    return true;
  }

  TensorView get() const { return TorchApi::get().view(source); }

  PyObject* source = nullptr;
};

// A list or tuple of tensors. It holds all tensors until the bound function returns, for another thread may change the
// list while a kernel runs. An iterator is refused: nothing else may hold its tensors.
struct TensorList : std::vector<TensorView> {
  // A lazily negated tensor is the imaginary part of a conjugate. Its elements are not neighbours, so the checks of
  // strides refuse it unless it has a single element.
  bool is_negated(size_t i) const {
    return (*this)[i].numel() == 1 && py::handle(PyTuple_GET_ITEM(held.ptr(), i)).attr("is_neg")().cast<bool>();
  }

  py::object held;
};

template <>
struct Reader<TensorList> {
  static std::string expected() { return "a list or tuple of torch.Tensor"; }

  bool load(PyObject* list) {
    if (PyTuple_Check(list))
      held = py::reinterpret_borrow<py::object>(list);
    else if (PyList_Check(list))
      held = py::reinterpret_steal<py::object>(PyList_AsTuple(list));
    else
      return false;
    if (!held) throw py::error_already_set();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(held.ptr()); ++i)
      if (!Reader<TensorView>().load(PyTuple_GET_ITEM(held.ptr(), i))) return false;
    return true;
  }

  TensorList get() {
    TensorList views;
    views.reserve(PyTuple_GET_SIZE(held.ptr()));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(held.ptr()); ++i)
      views.push_back(Reader<TensorView>{PyTuple_GET_ITEM(held.ptr(), i)}.get());
    views.held = std::move(held);
    return views;
  }

  py::object held;
};

}  // namespace torchweld
