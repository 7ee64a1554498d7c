#include "cuda/device.h"

#include <cuda.h>

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

// A function of the driver, which is not linked. 12000 is the version that the names in cuda.h stand for.
template <class F>
F* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  check(name, cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found));
#else
  check(name, cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found));
#endif
  if (function == nullptr)
    throw std::runtime_error("[" + std::string(name) + "] CUDA: the driver has no such function");
  return reinterpret_cast<F*>(function);
}

struct Driver {
  decltype(cuDevicePrimaryCtxRetain)* retain =
      driver_function<decltype(cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain");
  decltype(cuDevicePrimaryCtxRelease)* release =
      driver_function<decltype(cuDevicePrimaryCtxRelease)>("cuDevicePrimaryCtxRelease");
  decltype(cuCtxPushCurrent)* push = driver_function<decltype(cuCtxPushCurrent)>("cuCtxPushCurrent");
  decltype(cuCtxPopCurrent)* pop = driver_function<decltype(cuCtxPopCurrent)>("cuCtxPopCurrent");
};

const Driver& driver() {
  static const Driver functions;
  return functions;
}

void check_driver(CUresult result) {
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("[device guard] CUDA: the driver's error " + std::to_string(static_cast<int>(result)));
}

}  // namespace

void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error: the next launch must not report it again
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

DeviceGuard::DeviceGuard(int device) : device_(device), pushed_(current_device() != device) {
  if (!pushed_) return;
  CUcontext context = nullptr;
  check_driver(driver().retain(&context, device));
  check_driver(driver().push(context));
}

DeviceGuard::~DeviceGuard() {
  if (!pushed_) return;
  CUcontext context = nullptr;
  driver().pop(&context);
  driver().release(device_);
}

}  // namespace torchweld::cuda
