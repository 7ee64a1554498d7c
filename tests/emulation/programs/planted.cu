// Kernels with one mistake each, which the machine must find. `planted NAME` runs one and prints the error.
#include <cstdio>

#include "cuda/ptx.cuh"
#include "cuda/ptx_sm90.cuh"

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

// ---- Hopper

__device__ uint32_t barrier(int i) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + 8 * i; }
__device__ uint32_t tile() { return barrier(0) + 1024; }
__device__ float* tile_floats() { return floats() + 256; }

__device__ void begin(uint32_t count) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier(0), count);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
}

// The first phase has parity 0, so a wait for parity 1 returns at once.
__global__ void phase_error(float* out) {
  begin(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(barrier(0), 256);
    ptx::bulk_load(tile(), out, 256, barrier(0));
  }
  ptx::mbarrier_wait(barrier(0), 1);
  out[64 + threadIdx.x] = tile_floats()[threadIdx.x];
}

__global__ void too_few_bytes_expected(float* out) {
  begin(1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(barrier(0), 128);
    ptx::bulk_load(tile(), out, 256, barrier(0));
  }
  ptx::mbarrier_wait(barrier(0), 0);
}

__global__ void too_many_arrive(float*) {
  begin(63);
  if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(barrier(0), 16);
  if (threadIdx.x > 0) ptx::mbarrier_arrive(barrier(0));
}

__global__ void mbarrier_without_init(float*) { ptx::mbarrier_arrive(barrier(1)); }

// The second load overwrites a slot that some threads still read: no barrier says that the slot is empty.
__global__ void slot_reused_too_early(float* out) {
  begin(1);
  for (uint32_t round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect(barrier(0), 256);
      ptx::bulk_load(tile(), out, 256, barrier(0));
    }
    ptx::mbarrier_wait(barrier(0), round);
    out[64 + threadIdx.x] = tile_floats()[threadIdx.x];
  }
}

__global__ void missing_proxy_fence(float* out) {
  tile_floats()[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(out, tile(), 256);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

// Without a fence, asynchronous instructions do not see what cp.async has copied.
__global__ void missing_fence_of_a_copy(float* out) {
  ptx::cp_async<4>(tile() + 4 * threadIdx.x, out + threadIdx.x, 4);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(out, tile(), 256);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

__global__ void store_reused_too_early(float* out) {
  tile_floats()[threadIdx.x] = 1.0f;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(out, tile(), 256);
    ptx::bulk_commit();
    tile_floats()[0] = 2.0f;  // bulk_wait_read belongs before
    ptx::bulk_wait<0>();
  }
}

__global__ void store_not_waited_for(float* out) {
  tile_floats()[threadIdx.x] = 1.0f;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(out, tile(), 256);
    ptx::bulk_commit();
  }
}

// Each pair of warps has its own barrier, and one warp comes to the wrong one.
__global__ void wrong_named_barrier(float*) { ptx::barrier_sync(threadIdx.x < 32 ? 1 : 2, 64); }

template <bool kFence, bool kWait>
__device__ void multiply(float* out) {
  for (int i = 0; i < 16; ++i) tile_floats()[16 * threadIdx.x + i] = 0.0f;
  ptx::fence_proxy_async();
  __syncthreads();
  float c[8][4];
  const uint64_t matrix = ptx::descriptor(tile(), 1024, 128, ptx::Swizzle::none);
  if (kFence) ptx::wgmma_fence();
  ptx::wgmma<__nv_bfloat16, 64>(c, matrix, matrix, false);
  ptx::wgmma_commit();
  if (kWait) ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0];
}
__global__ void missing_wgmma_fence(float* out) { multiply<false, true>(out); }
__global__ void missing_wgmma_wait(float* out) { multiply<true, false>(out); }

__global__ void matrix_overwritten_too_early(float* out) {
  for (int i = 0; i < 16; ++i) tile_floats()[16 * threadIdx.x + i] = 0.0f;
  ptx::fence_proxy_async();
  __syncthreads();
  float c[8][4];
  const uint64_t matrix = ptx::descriptor(tile(), 1024, 128, ptx::Swizzle::none);
  ptx::wgmma_fence();
  ptx::wgmma<__nv_bfloat16, 64>(c, matrix, matrix, false);
  ptx::wgmma_commit();
  tile_floats()[0] = 1.0f;  // wgmma_wait, and a barrier, belong before
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0];
}

// The matrix has rows of 64 bytes, and the descriptor says 128.
__global__ void wrong_swizzle(float* out) {
  for (int i = 0; i < 8; ++i) tile_floats()[8 * threadIdx.x + i] = 0.0f;
  ptx::fence_proxy_async();
  __syncthreads();
  float c[8][4];
  const uint64_t left = ptx::descriptor(tile(), 0, 512, ptx::Swizzle::bytes64);
  ptx::wgmma_fence();
  ptx::wgmma<__nv_bfloat16, 64>(c, left, ptx::descriptor(tile(), 0, 1024, ptx::Swizzle::bytes128), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0];
}

struct Planted {
  const char* name;
  Kernel kernel;
  int threads = 64;
  size_t shared = 64 * sizeof(float);
};
#define PLANTED(kernel) {#kernel, kernel}
#define PLANTED_ON_HOPPER(kernel, threads) \
  {#kernel, kernel, threads, 1024 + 4 * threads * sizeof(float) * (threads == 128 ? 4 : 1)}
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
    PLANTED(endless_wait),
    PLANTED(out_of_bounds_store),
    PLANTED(out_of_bounds_load),
    PLANTED(read_of_poison),
    PLANTED(read_of_static_poison),
    PLANTED(misaligned_load),
    PLANTED(null_pointer),
    PLANTED_ON_HOPPER(phase_error, 64),
    PLANTED_ON_HOPPER(too_few_bytes_expected, 64),
    PLANTED_ON_HOPPER(too_many_arrive, 64),
    PLANTED_ON_HOPPER(mbarrier_without_init, 64),
    PLANTED_ON_HOPPER(slot_reused_too_early, 64),
    PLANTED_ON_HOPPER(missing_proxy_fence, 64),
    PLANTED_ON_HOPPER(missing_fence_of_a_copy, 64),
    PLANTED_ON_HOPPER(store_reused_too_early, 64),
    PLANTED_ON_HOPPER(store_not_waited_for, 64),
    PLANTED_ON_HOPPER(wrong_named_barrier, 64),
    PLANTED_ON_HOPPER(missing_wgmma_fence, 128),
    PLANTED_ON_HOPPER(missing_wgmma_wait, 128),
    PLANTED_ON_HOPPER(matrix_overwritten_too_early, 128),
    PLANTED_ON_HOPPER(wrong_swizzle, 128),
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
      launch("planted", planted.kernel, dim3(1), dim3(planted.threads), planted.shared, nullptr,
             static_cast<float*>(memory));
      std::printf("%s: nothing was found\n", planted.name);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", planted.name, error.what());
    }
  }
  return 0;
}
