// Mistakes in global memory: races within a block and between blocks, and protocols between blocks. `out` is zeros.
#include "cuda/ptx_sm90.cuh"
#include "planted.cuh"

namespace torchweld::cuda {
namespace {

__device__ int* counter(float* out) { return reinterpret_cast<int*>(out) + 512; }
__device__ volatile int* flags(float* out) { return reinterpret_cast<int*>(out) + 640; }

__device__ void wait_for(volatile int* flag) {
  while (*flag == 0) {
  }
}

// ---- Within a block

__global__ void missing_barrier_in_global_memory(float* out) {
  out[threadIdx.x] = 1.0f;
  out[64 + threadIdx.x] = out[(threadIdx.x + 32) % blockDim.x];
}

__global__ void missing_syncwarp_in_global_memory(float* out) {
  out[threadIdx.x] = 1.0f;
  out[64 + threadIdx.x] = out[threadIdx.x ^ 1];
}

__global__ void two_writers_of_a_word(float* out) { out[threadIdx.x / 2] = 1.0f; }

__global__ void two_writers_of_a_byte(float* out) {
  reinterpret_cast<char*>(out)[(threadIdx.x + 1) / 2] = 1;  // threads 1 and 2 write byte 1
}

__global__ void plain_write_beside_an_atomic(float* out) {
  if (threadIdx.x == 0) out[0] = 1.0f;
  if (threadIdx.x == 33) atomicAdd(out, 1.0f);
}

__global__ void copy_of_what_another_thread_writes(float* out) {
  out[threadIdx.x] = 1.0f;
  ptx::cp_async<4>(ptx::shared_base() + 4 * threadIdx.x, out + (threadIdx.x + 32) % blockDim.x, 4);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

__global__ void write_beside_a_copy_in_flight(float* out) {
  if (threadIdx.x == 0) ptx::cp_async<4>(ptx::shared_base(), out + 63, 4);
  ptx::cp_async_commit();
  __syncthreads();
  out[threadIdx.x] = 1.0f;
  __syncthreads();
  ptx::cp_async_wait<0>();  // belongs before the barrier
}

// A bulk store writes global memory some time until it is waited for.
__global__ void bulk_store_read_too_early(float* out) {
  reinterpret_cast<float*>(shared_memory)[threadIdx.x] = 1.0f;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(out, ptx::shared_base(), 256);
    ptx::bulk_commit();
  }
  __syncthreads();
  out[64 + threadIdx.x] = out[threadIdx.x];
  if (threadIdx.x == 0) ptx::bulk_wait<0>();
}

__global__ void bulk_load_of_what_another_thread_writes(float* out) {
  __shared__ uint64_t mbarrier;
  const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&mbarrier));
  if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 1);
  __syncthreads();
  out[threadIdx.x] = 1.0f;
  if (threadIdx.x == 0) {
    ptx::mbarrier_arrive_expect(barrier, 256);
    ptx::bulk_load(ptx::shared_base(), out, 256, barrier);
  }
  ptx::mbarrier_wait(barrier, 0);
}

// ---- Between blocks

__global__ void blocks_write_one_word(float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }

__global__ void block_reads_what_another_writes(float* out) {
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  out[64 * blockIdx.x + threadIdx.x] = 1.0f;
  out[256 + 64 * blockIdx.x + threadIdx.x] = out[64 * next + threadIdx.x];
}

__global__ void plain_read_of_an_accumulator(float* out) {
  if (threadIdx.x == 0) atomicAdd(out, 1.0f);
  out[1 + blockIdx.x * 64 + threadIdx.x] = out[0];
}

__global__ void non_coherent_load_of_own_write(float* out) {
  out[threadIdx.x] = 1.0f;
  out[64 + threadIdx.x] = __ldg(out + threadIdx.x);
}

// ---- The last block sums the parts of all. Each kernel below leaves out one step.

struct Steps {
  bool barrier = true, release = true, whole_device = true, acquire = true, coherent = true;
};

__device__ void sum_of_parts(float* out, const Steps& steps) {
  __shared__ int place;
  float* parts = out + 64 * (1 + blockIdx.x);
  parts[threadIdx.x] = 1.0f;
  if (steps.barrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (steps.release) steps.whole_device ? __threadfence() : __threadfence_block();
    place = atomicAdd(counter(out), 1);
    if (steps.acquire) __threadfence();
  }
  __syncthreads();
  if (place + 1 < static_cast<int>(gridDim.x)) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; ++b) {
    const float* part = out + 64 * (1 + b) + threadIdx.x;
    sum += steps.coherent ? *part : __ldg(part);
  }
  out[threadIdx.x] = sum;
}

__global__ void missing_fence_before_the_counter(float* out) {
  Steps steps;
  steps.release = false;
  sum_of_parts(out, steps);
}

__global__ void fence_of_the_block_only(float* out) {
  Steps steps;
  steps.whole_device = false;
  sum_of_parts(out, steps);
}

__global__ void missing_fence_after_the_counter(float* out) {
  Steps steps;
  steps.acquire = false;
  sum_of_parts(out, steps);
}

// The fence of thread 0 does not release what the other threads have written.
__global__ void missing_barrier_before_the_fence(float* out) {
  Steps steps;
  steps.barrier = false;
  sum_of_parts(out, steps);
}

__global__ void non_coherent_load_of_a_part(float* out) {
  Steps steps;
  steps.coherent = false;
  sum_of_parts(out, steps);
}

// ---- A block waits for another one

__global__ void flag_without_fences(float* out) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) out[0] = 1.0f, *flags(out) = 1;
  } else if (threadIdx.x == 0) {
    wait_for(flags(out));
    __threadfence();
    out[1] = out[0];
  }
}

__global__ void flag_of_a_plain_store(float* out) {
  if (threadIdx.x > 0) return;
  if (blockIdx.x == 0)
    *const_cast<int*>(flags(out)) = 1;
  else
    wait_for(flags(out));
}

// Only thread 0 has waited: the others know nothing of the other block.
__global__ void missing_barrier_after_the_wait(float* out) {
  if (blockIdx.x == 0) {
    out[threadIdx.x] = 1.0f;
    __syncthreads();
    __threadfence();
    if (threadIdx.x == 0) *flags(out) = 1;
  } else {
    if (threadIdx.x == 0) wait_for(flags(out));
    __threadfence();
    out[64 + threadIdx.x] = out[threadIdx.x];
  }
}

__global__ void missing_syncwarp_after_the_wait(float* out) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) {
      out[0] = 1.0f;
      __threadfence();
      *flags(out) = 1;
    }
  } else if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
      wait_for(flags(out));
      __threadfence();
    }
    out[64 + threadIdx.x] = out[0];
  }
}

// Nothing says that block 0 starts before block 1: as soon as there are more blocks than can run at once, the chain may
// hang.
__global__ void chain_by_numbers(float* out) {
  if (threadIdx.x > 0) return;
  if (blockIdx.x > 0) wait_for(flags(out) + blockIdx.x - 1);
  flags(out)[blockIdx.x] = 1;
}

__global__ void wait_for_a_later_block(float* out) {
  if (threadIdx.x > 0) return;
  if (blockIdx.x + 1 < gridDim.x) wait_for(flags(out) + blockIdx.x + 1);
  flags(out)[blockIdx.x] = 1;
}

__global__ void barrier_of_a_grid_that_does_not_fit(float* out) {
  if (threadIdx.x > 0) return;
  atomicAdd(counter(out), 1);
  while (atomicAdd(counter(out), 0) < static_cast<int>(gridDim.x)) {
  }
}

__global__ void too_many_blocks(float*) {}

constexpr Planted of_blocks(const char* name, void (*kernel)(float*), int blocks, unsigned seed = 0) {
  return {name, kernel, 64, 64 * sizeof(float), seed, 0, blocks};
}

#define PLANTED(kernel, ...) of_blocks(#kernel, kernel, __VA_ARGS__)
constexpr Planted kPlanted[] = {
    PLANTED(missing_barrier_in_global_memory, 1),
    PLANTED(missing_syncwarp_in_global_memory, 1),
    PLANTED(two_writers_of_a_word, 1),
    PLANTED(two_writers_of_a_byte, 1),
    PLANTED(plain_write_beside_an_atomic, 1),
    PLANTED(copy_of_what_another_thread_writes, 1),
    PLANTED(write_beside_a_copy_in_flight, 1),
    PLANTED(bulk_store_read_too_early, 1),
    PLANTED(bulk_load_of_what_another_thread_writes, 1),
    PLANTED(blocks_write_one_word, 2),
    PLANTED(block_reads_what_another_writes, 4),
    PLANTED(plain_read_of_an_accumulator, 2),
    PLANTED(non_coherent_load_of_own_write, 1),
    PLANTED(missing_fence_before_the_counter, 4),
    PLANTED(fence_of_the_block_only, 4),
    PLANTED(missing_fence_after_the_counter, 4),
    PLANTED(missing_barrier_before_the_fence, 4),
    PLANTED(non_coherent_load_of_a_part, 4),
    PLANTED(flag_without_fences, 2),
    PLANTED(flag_of_a_plain_store, 2),
    PLANTED(missing_barrier_after_the_wait, 2),
    PLANTED(missing_syncwarp_after_the_wait, 2),
    PLANTED(chain_by_numbers, 300, 1),
    PLANTED(wait_for_a_later_block, 300),
    PLANTED(barrier_of_a_grid_that_does_not_fit, 300),
    PLANTED(too_many_blocks, 2097153),
};

}  // namespace
}  // namespace torchweld::cuda

int main(int count, char** arguments) {
  return torchweld::cuda::run_planted(torchweld::cuda::kPlanted, count, arguments);
}
