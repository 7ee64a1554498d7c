// The part of the DLPack 1.3 ABI that torchweld reads: how torch hands over a tensor (DLTensor,
// DLManagedTensorVersioned) and its C exchange API, a table of functions that torch >= 2.10 publishes as the capsule
// torch.Tensor.__dlpack_c_exchange_api__. Field order and types are the ABI
// (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace torchweld::dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  DeviceType type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // [ndim], owned by the tensor
  int64_t* strides;  // [ndim], in elements
  uint64_t byte_offset;
};

struct ManagedTensor {
  uint32_t major, minor;
  void* manager_ctx;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeAPI {
  uint32_t major, minor;
  ExchangeAPI* previous;
  // Allocates a tensor of prototype's device, dtype and shape. Returns -1 after a call of set_error if it cannot.
  int (*managed_tensor_allocator)(Tensor* prototype, ManagedTensor** out, void* error_ctx,
                                  void (*set_error)(void* error_ctx, const char* kind, const char* message));
  void* managed_tensor_from_py_object;
  int (*managed_tensor_to_py_object)(ManagedTensor* tensor, void** out);  // takes the tensor over
  int (*tensor_from_py_object)(void* py_object, Tensor* out);  // borrows: valid while the Python tensor lives
  int (*current_work_stream)(DeviceType type, int32_t index, void** stream);
};

}  // namespace torchweld::dlpack
