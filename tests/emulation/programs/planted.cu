// Mistakes that a kernel for any GPU can have.
#include "planted.cuh"

namespace torchweld::cuda {
namespace {

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

// A loop that reuses its memory needs a second barrier: the next round overwrites what other threads still read.
__global__ void missing_second_barrier(float* out) {
  for (int round = 0; round < 2; ++round) {
    floats()[threadIdx.x] = static_cast<float>(round);
    __syncthreads();
    out[threadIdx.x] = floats()[(threadIdx.x + 32) % blockDim.x];
  }
}

// ---- Collectives and barriers that some threads do not reach

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

// Barriers and products of matrices are one instruction for all lanes of a warp: at two places they are two.
__global__ void barrier_at_two_places(float* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = 1.0f;
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void product_at_two_places(float* out) {
  float c[4] = {};
  const uint32_t a[4] = {};
  if (threadIdx.x % 32 < 16) {
    ptx::mma<__nv_bfloat16>(c, a, 0, 0);
  } else {
    ptx::mma<__nv_bfloat16>(c, a, 0, 0);
  }
  out[threadIdx.x] = c[0];
}

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

// The launch asks for 1008 bytes more than a tile, so that the tile can begin on a multiple of 1024. Writing beyond its
// 256 bytes shows where the alignment has taken the 1008.
__global__ void overrun_into_the_slack(float*) {
  const uint32_t tile = (ptx::shared_base() + 1023) / 1024 * 1024;
  ptx::store_shared(tile + 8 * threadIdx.x, 0u);
}

// ---- Numbers

// 1 / 3 may be a bit too small, and then 6 / 3 is 1.
__global__ void exact_reciprocal(float* out) {
  const auto quotient = static_cast<int>(6.0f * ptx::reciprocal(3.0f + static_cast<float>(threadIdx.x % 2 * 0)));
  if (quotient != 2) ptx::refuse("a quotient of 2", "exact_reciprocal");
  out[threadIdx.x] = static_cast<float>(quotient);
}

#define PLANTED(kernel) {#kernel, kernel}
constexpr Planted kPlanted[] = {
    PLANTED(missing_barrier),
    PLANTED(missing_syncwarp),
    PLANTED(race_of_two_writers),
    PLANTED(missing_second_barrier),
    PLANTED(divergent_barrier),
    PLANTED(divergent_shuffle),
    PLANTED(different_collectives),
    PLANTED(shuffle_beyond_the_mask),
    PLANTED(mask_without_the_caller),
    PLANTED(barrier_at_two_places),
    PLANTED(product_at_two_places),
    PLANTED(endless_wait),
    PLANTED(out_of_bounds_store),
    PLANTED(out_of_bounds_load),
    PLANTED(read_of_poison),
    PLANTED(read_of_static_poison),
    PLANTED(misaligned_load),
    PLANTED(null_pointer),
    {"overrun_into_the_slack", overrun_into_the_slack, 64, 256 + 1008, 1},
    {"exact_reciprocal", exact_reciprocal, 64, 256, 0, 1},
};

}  // namespace
}  // namespace torchweld::cuda

int main(int count, char** arguments) {
  return torchweld::cuda::run_planted(torchweld::cuda::kPlanted, count, arguments);
}
