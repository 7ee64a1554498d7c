// Kernels with one mistake each, which the machine must find: planted NAME runs one and prints the error.
#include <cstdio>

#include "cuda/common.cuh"

namespace torchweld::cuda {
namespace {

using Kernel = void (*)(float*);
constexpr unsigned kAll = 0xffffffffu;

__device__ float* floats() { return reinterpret_cast<float*>(shared_memory); }

// ---- Races

__global__ void missing_barrier(float* out) {
  floats()[threadIdx.x] = 1.0f;
  out[threadIdx.x] = floats()[(threadIdx.x + 32) % blockDim.x];  // __syncthreads() belongs between
}

__global__ void missing_syncwarp(float* out) {
  floats()[threadIdx.x] = 1.0f;
  out[threadIdx.x] = floats()[threadIdx.x ^ 1];  // __syncwarp() belongs between
}

__global__ void race_of_two_writers(float*) { floats()[threadIdx.x / 2] = static_cast<float>(threadIdx.x); }

// A loop that reuses its memory needs a second barrier, lest the next round overwrites what is still read.
__global__ void missing_second_barrier(float* out) {
  for (int round = 0; round < 2; ++round) {
    floats()[threadIdx.x] = static_cast<float>(round);
    __syncthreads();
    out[threadIdx.x] = floats()[(threadIdx.x + 32) % blockDim.x];
  }
}

// ---- Collectives and barriers that not all reach

__global__ void divergent_barrier(float*) {
  if (threadIdx.x != 5) __syncthreads();
}

__global__ void divergent_shuffle(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}

__global__ void different_collectives(float* out) {
  if (threadIdx.x % 2 == 0)
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 2);
  else
    __syncwarp();
}

__global__ void shuffle_beyond_the_mask(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void mask_without_the_caller(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

__global__ void endless_wait(float* out) {
  if (threadIdx.x == 0)
    while (atomicAdd(out, 0.0f) == 0.0f) {
    }
}

// ---- Memory

__global__ void out_of_bounds_store(float*) { floats()[threadIdx.x + 1] = 1.0f; }

__global__ void out_of_bounds_load(float* out) { out[threadIdx.x] = floats()[threadIdx.x + blockDim.x]; }

__global__ void read_of_poison(float* out) {
  if (threadIdx.x != 7) floats()[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = floats()[threadIdx.x];
}

__global__ void read_of_static_poison(float* out) {
  __shared__ float total;
  if (out == nullptr) total = 1.0f;
  out[threadIdx.x] = total;
}

__global__ void misaligned_load(float* out) {
  const uint4 packet = __ldg(reinterpret_cast<const uint4*>(out + 1));
  out[threadIdx.x] = static_cast<float>(packet.x + packet.y + packet.z + packet.w);
}

__global__ void null_pointer(float* out) {
  if (blockIdx.x == 0 && threadIdx.x == 33) *reinterpret_cast<volatile float*>(out - out) = 1.0f;
}

struct Planted {
  const char* name;
  Kernel kernel;
};
#define PLANTED(kernel) {#kernel, kernel}
constexpr Planted kPlanted[] = {
    PLANTED(missing_barrier),        PLANTED(missing_syncwarp),        PLANTED(race_of_two_writers),
    PLANTED(missing_second_barrier), PLANTED(divergent_barrier),       PLANTED(divergent_shuffle),
    PLANTED(different_collectives),  PLANTED(shuffle_beyond_the_mask), PLANTED(mask_without_the_caller),
    PLANTED(endless_wait),           PLANTED(out_of_bounds_store),     PLANTED(out_of_bounds_load),
    PLANTED(read_of_poison),         PLANTED(read_of_static_poison),   PLANTED(misaligned_load),
    PLANTED(null_pointer),
};

}  // namespace
}  // namespace torchweld::cuda

int main(int count, char** arguments) {
  using namespace torchweld::cuda;
  void* memory = nullptr;
  check("planted", cudaMalloc(&memory, 4096));
  for (const Planted& planted : kPlanted) {
    if (count > 1 && std::strcmp(planted.name, arguments[1]) != 0) continue;
    try {
      std::memset(memory, 0, 4096);
      launch("planted", planted.kernel, dim3(1), dim3(64), 64 * sizeof(float), nullptr, static_cast<float*>(memory));
      std::printf("%s: nothing was found\n", planted.name);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", planted.name, error.what());
    }
  }
  return 0;
}
