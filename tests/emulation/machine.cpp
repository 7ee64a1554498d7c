// Runs a kernel on the CPU: a fiber for each thread of a block, which gives way at every barrier and shuffle until all
// of its block or warp have come there; the blocks one after the other.
#include "machine.h"

#include <ucontext.h>

#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace torchweld::cuda {

extern thread_local uint4 shared_memory[];
alignas(128) thread_local uint4 shared_memory[232448 / 16];

}  // namespace torchweld::cuda

namespace emulation {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr unsigned kWithoutAsking = 48 * 1024;

// All of a group must come before any goes on.
struct Meeting {
  int size = 0, arrived = 0;
  unsigned long round = 0;
};

struct Warp {
  Meeting meeting;
  float values[2][32];
  int lane_mask = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint3 index;
  int lane;
  Warp* warp;
  unsigned long shuffles;
  Meeting* waits_at;
  unsigned long waits_for;
  bool done;

  bool ready() const { return !done && (waits_at == nullptr || waits_at->round >= waits_for); }
};

ucontext_t scheduler;
Fiber* current;
Meeting block;
const std::function<void()>* program;
std::string failure;
std::set<const void*> asked_for_more;

void give_way() {
  Fiber* self = current;
  swapcontext(&self->context, &scheduler);
}

void meet(Meeting& meeting) {
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  current->waits_at = &meeting;
  current->waits_for = meeting.round + 1;
  give_way();
  current->waits_at = nullptr;
}

void entry() {
  (*program)();
  current->done = true;
  give_way();
}

void run_block(std::vector<Fiber>& fibers, std::vector<Warp>& warps) {
  const int threads = static_cast<int>(fibers.size());
  block = {threads, 0, 0};
  for (int t = 0; t < threads; ++t) {
    Fiber& f = fibers[t];
    f.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    f.lane = t % 32;
    f.warp = &warps[t / 32];
    f.warp->meeting = {32, 0, 0};
    f.shuffles = 0;
    f.waits_at = nullptr;
    f.done = false;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
  for (int left = threads; left > 0;) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& f = fibers[machine().falling ? threads - 1 - i : i];
      if (!f.ready()) continue;
      moved = true;
      current = &f;
      threadIdx = f.index;
      swapcontext(&scheduler, &f.context);
      if (!failure.empty()) throw std::runtime_error(failure);
      left -= f.done;
    }
    if (!moved) throw std::runtime_error("deadlock: some threads wait at a barrier or shuffle that others never reach");
  }
}

}  // namespace

Machine& machine() {
  static Machine value;
  return value;
}

void fail(const char* message) {
  failure = message;
  give_way();
  throw std::logic_error("a failed thread went on");
}

bool may_use_more_shared_memory(const void* kernel) { return asked_for_more.count(kernel) > 0; }

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& thread, bool more_shared_memory) {
  const dim3 grid = config.gridDim;
  const unsigned threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  const size_t limit = more_shared_memory ? machine().shared_bytes_per_block : kWithoutAsking;
  if (grid.x == 0 || grid.y == 0 || grid.x > INT32_MAX || grid.y > 65535 || threads == 0 || threads > 1024 ||
      threads % 32 != 0 || config.dynamicSmemBytes > limit)
    return cudaErrorInvalidConfiguration;

  std::vector<Fiber> fibers(threads);
  std::vector<Warp> warps(threads / 32);
  blockDim = config.blockDim;
  gridDim = grid;
  program = &thread;
  failure.clear();
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      std::memset(torchweld::cuda::shared_memory, 0xff, sizeof(torchweld::cuda::shared_memory));
      run_block(fibers, warps);
      const auto* beyond = reinterpret_cast<const unsigned char*>(torchweld::cuda::shared_memory);
      for (size_t i = config.dynamicSmemBytes; i < sizeof(torchweld::cuda::shared_memory); ++i)
        if (beyond[i] != 0xff) throw std::runtime_error("shared memory written beyond what the launch asked for");
    }
  return cudaSuccess;
}

}  // namespace emulation

using namespace emulation;

void __syncthreads() { meet(block); }

float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  Fiber& self = *current;
  Warp& warp = *self.warp;
  if (mask != 0xffffffffu) fail("shuffle of part of a warp");
  if (warp.meeting.arrived > 0 && warp.lane_mask != lane_mask) fail("the lanes of a warp are at different shuffles");
  warp.lane_mask = lane_mask;
  float* values = warp.values[self.shuffles++ % 2];  // two by turns: a lane may reach the next before all have read
  values[self.lane] = value;
  meet(warp.meeting);
  return values[self.lane ^ lane_mask];
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "error";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "emulated";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? machine().multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? machine().shared_bytes_per_block
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 9
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > machine().shared_bytes_per_block) return cudaErrorInvalidConfiguration;
  asked_for_more.insert(kernel);
  return cudaSuccess;
}
