// What the host asks of the CUDA runtime: errors as exceptions, properties of a device, a guard for the current device.
// Plain C++, so the bindings need no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

namespace torchweld::cuda {

// Throws std::runtime_error "[what] ..." with CUDA's own message, unless `error` is cudaSuccess.
void check(const char* what, cudaError_t error);

int current_device();
int compute_capability(int device);  // 80, 90, ...
int multiprocessors(int device);
int64_t shared_bytes_per_block(int device);  // the most that cudaFuncSetAttribute can give a block

std::string compiled_architectures();         // as given to CMake: "80 90a-real"
std::string runtime_version();                // of the CUDA runtime that is linked: "13.0"
std::optional<std::string> driver_version();  // the newest CUDA that the driver supports; none without a driver
std::optional<std::string> unavailable();     // why no GPU can be used here; none if one can

// Makes a device current while the guard lives, by the driver's stack of contexts. So the previous state comes back,
// even if no context was current. cudaSetDevice would create a context, and use memory, on GPU 0 in a thread that has
// none.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  bool pushed_;
};

}  // namespace torchweld::cuda
