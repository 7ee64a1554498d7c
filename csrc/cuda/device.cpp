#include "cuda/device.h"

#include <stdexcept>

namespace torchweld::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check("device query", cudaDeviceGetAttribute(&value, which, device));
  return value;
}

std::string version_text(int version) {  // 13020 -> "13.2"
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// What CUDA's message leaves out: what was built, and what to do.
std::string advice(cudaError_t error) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string number = std::to_string(major) + std::to_string(minor);
    return "; this GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           ", torchweld was compiled for " + compiled_architectures() + ": reinstall it with CUDAARCHS=" + number +
           " set, or use torchweld.use_backend('reference')";
  }
  if (error == cudaErrorInsufficientDriver) {
    const auto driver = driver_version();
    if (!driver) return "; no NVIDIA driver was found";
    return "; torchweld was built with CUDA " + runtime_version() + ", the driver serves " + *driver +
           ": update the driver or build with an older CUDA toolkit";
  }
  return "";
}

}  // namespace

void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken here: the next launch must not report it again
  throw std::runtime_error("[" + std::string(what) + "] CUDA: " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error) + advice(error));
}

int current_device() {
  int device = 0;
  check("device query", cudaGetDevice(&device));
  return device;
}

int compute_capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

int64_t shared_bytes_per_block(int device) { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

std::string compiled_architectures() { return TORCHWELD_CUDA_ARCHITECTURES; }

std::string runtime_version() { return version_text(CUDART_VERSION); }

std::optional<std::string> driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return std::nullopt;
  return version_text(version);
}

std::optional<std::string> unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return std::nullopt;
  cudaGetLastError();
  return error == cudaSuccess ? "no CUDA device" : cudaGetErrorString(error) + advice(error);
}

DeviceGuard::DeviceGuard(int device) {
  check("device guard", cudaGetDevice(&before_));
  changed_ = before_ != device;
  if (changed_) check("device guard", cudaSetDevice(device));
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(before_);
}

}  // namespace torchweld::cuda
