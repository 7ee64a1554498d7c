// What the host asks of the CUDA runtime: errors as exceptions, properties of a device, a guard for the current one.
// Plain C++, so that the bindings need no CUDA compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

namespace torchweld::cuda {

// Throws std::runtime_error "[what] ..." with CUDA's own message unless `error` is cudaSuccess.
void check(const char* what, cudaError_t error);

int current_device();
int compute_capability(int device);  // 80, 90, ...
int multiprocessors(int device);
int64_t shared_bytes_per_block(int device);  // what a block may have after cudaFuncSetAttribute raised its limit

std::string compiled_architectures();         // as CMake was told: "80 90a-real"
std::string runtime_version();                // of the CUDA runtime that is linked in: "13.0"
std::optional<std::string> driver_version();  // the newest CUDA that the driver serves, none without a driver
std::optional<std::string> unavailable();     // why no GPU can be used here, none if one can

// Makes a device current while it lives, by the stack of contexts: what was current before, be it none, stays below.
// cudaSetDevice would give a thread that has no context yet one of GPU 0, and the process its memory there.
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
