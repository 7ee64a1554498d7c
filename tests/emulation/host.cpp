// The host's side of the CUDA runtime: identical devices, whose memory is the host's.
#include <cuda.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kWithoutAsking = 48 * 1024;
std::set<const void*> asked_for_more;

// How often each device's context is retained, and the thread's stack of contexts.
std::map<int, int> retained;
thread_local std::vector<int> contexts;

}  // namespace

namespace emulation {

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const size_t limit = asked_for_more.count(kernel) > 0 ? machine().shared_bytes_per_block : kWithoutAsking;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024 || block.z > 64 ||
      config.dynamicSmemBytes > limit)
    return cudaErrorInvalidConfiguration;
  run({{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, {1, 1, 1}, config.dynamicSmemBytes}, kernel, thread);
  return cudaSuccess;
}

}  // namespace emulation

using emulation::machine;

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "error";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "emulated";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = contexts.empty() ? 0 : contexts.back(), cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  ++retained[device];
  if (contexts.empty()) contexts.push_back(device);
  contexts.back() = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  ++retained[device];
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 1);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) { return --retained[device], CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1);
  return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext* context) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_VALUE;
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(contexts.back()) + 1);
  contexts.pop_back();
  return CUDA_SUCCESS;
}
int emulation::contexts_of(int device) { return retained[device]; }

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
  static const std::map<std::string, void*> kFunctions{
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(cuTensorMapEncodeTiled)},
      {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(cuDevicePrimaryCtxRetain)},
      {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(cuDevicePrimaryCtxRelease)},
      {"cuCtxPushCurrent", reinterpret_cast<void*>(cuCtxPushCurrent)},
      {"cuCtxPopCurrent", reinterpret_cast<void*>(cuCtxPopCurrent)},
  };
  const auto found = kFunctions.find(symbol);
  *function = found != kFunctions.end() ? found->second : nullptr;
  *result = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result) {
  return cudaGetDriverEntryPoint(symbol, function, flags, result);
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *memory != nullptr ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? machine().multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? machine().shared_bytes_per_block
           : attribute == cudaDevAttrComputeCapabilityMajor       ? machine().capability / 10
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > machine().shared_bytes_per_block) return cudaErrorInvalidConfiguration;
  asked_for_more.insert(kernel);
  return cudaSuccess;
}
