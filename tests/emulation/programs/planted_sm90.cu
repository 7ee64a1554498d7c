// Mistakes that a kernel for Hopper can have.
#include "cuda/ptx_sm90.cuh"
#include "planted.cuh"

namespace torchweld::cuda {
namespace {

__device__ float* floats() { return reinterpret_cast<float*>(shared_memory); }

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

// A warp that arrives again before the other one has come is counted for it.
__global__ void arrives_twice(float*) {
  if (threadIdx.x < 32)
    for (int i = 0; i < 2; ++i) ptx::barrier_arrive(1, 64);
}

// Two halves of two warps are as many threads as one warp.
__global__ void halves_of_warps(float*) {
  if (threadIdx.x % 32 < 16) ptx::barrier_sync(1, 32);
}

// ---- wgmma

// Zeros, 64 rows of 32 bytes, not swizzled.
__device__ uint64_t zeros() {
  for (int i = 0; i < 16; ++i) tile_floats()[16 * threadIdx.x + i] = 0.0f;
  ptx::fence_proxy_async();
  __syncthreads();
  return ptx::descriptor(tile(), 1024, 128, ptx::Swizzle::none);
}
// One product of these. The mistakes are in what comes before or after it.
__device__ void multiply(float (&c)[8][4], uint64_t matrix) {
  ptx::wgmma<__nv_bfloat16, 64>(c, matrix, matrix, false);
  ptx::wgmma_commit();
}
__device__ void multiply(float (&c)[8][4], const uint32_t (&a)[4], uint64_t matrix) {
  ptx::wgmma<__nv_bfloat16, 64>(c, a, matrix, false);
  ptx::wgmma_commit();
}

__global__ void missing_wgmma_fence(float* out) {
  float c[8][4];
  const uint64_t matrix = zeros();
  ptx::wgmma<__nv_bfloat16, 64>(c, matrix, matrix, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0];
}

__global__ void missing_wgmma_wait(float* out) {
  float c[8][4];
  const uint64_t matrix = zeros();
  ptx::wgmma_fence();
  multiply(c, matrix);
  out[threadIdx.x] = 1.0f;
}

__global__ void matrix_overwritten_too_early(float* out) {
  float c[8][4];
  const uint64_t matrix = zeros();
  ptx::wgmma_fence();
  multiply(c, matrix);
  tile_floats()[0] = 1.0f;  // wgmma_wait, and a barrier, belong before
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0];
}

__global__ void accumulator_read_in_flight(float* out) {
  float c[8][4];
  const uint64_t matrix = zeros();
  ptx::wgmma_fence();
  multiply(c, matrix);
  out[threadIdx.x] = c[0][0];
  ptx::wgmma_wait<0>();
}

__global__ void left_operand_written_in_flight(float* out) {
  float c[8][4];
  uint32_t a[4] = {};
  const uint64_t matrix = zeros();
  ptx::wgmma_fence();
  multiply(c, a, matrix);
  a[1] = __float_as_uint(out[threadIdx.x]);  // of the next product
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0] + static_cast<float>(a[1]);
}

// The fence for the first product does not cover registers that are written after it.
__global__ void left_operand_after_the_fence(float* out) {
  float c[8][4], d[8][4];
  uint32_t a[4] = {};
  const uint64_t matrix = zeros();
  ptx::wgmma_fence();
  multiply(c, matrix);
  for (uint32_t& word : a) word = __float_as_uint(out[threadIdx.x]);
  multiply(d, a, matrix);
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0] + d[0][0] + static_cast<float>(a[0]);
}

__global__ void accumulator_after_the_fence(float* out) {
  float c[8][4], d[8][4] = {};
  const uint64_t matrix = zeros();
  ptx::wgmma_fence();
  multiply(c, matrix);
  d[7][3] = out[threadIdx.x];
  multiply(d, matrix);
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0] + d[7][3];
}

__global__ void wgmma_at_two_places(float* out) {
  float c[8][4];
  const uint64_t matrix = zeros();
  if (threadIdx.x % 32 < 16) {
    ptx::wgmma_fence();
  } else {
    ptx::wgmma_fence();
  }
  multiply(c, matrix);
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

// The compiler may give shared memory any multiple of 16. The swizzle's atoms begin on multiples of 1024.
__global__ void matrix_off_its_alignment(float* out) {
  zeros();
  float c[8][4];
  const uint64_t matrix = ptx::descriptor(tile(), 0, 1024, ptx::Swizzle::bytes128);
  ptx::wgmma_fence();
  multiply(c, matrix);
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = c[0][0];
}

// The field holds addresses below 256 KB.
__global__ void matrix_beyond_the_field(float* out) {
  out[0] = static_cast<float>(ptx::descriptor(tile() + (1 << 18), 1024, 128, ptx::Swizzle::none));
}

// ---- setmaxnreg: 384 threads begin with 168 registers each.

__global__ void more_registers_than_there_are(float*) {
  if (threadIdx.x < 256) {
    ptx::registers_increase<240>();
  } else {
    ptx::registers_decrease<32>();
  }
}

__global__ void registers_of_half_a_warpgroup(float*) {
  if (threadIdx.x < 64) ptx::registers_decrease<24>();
}

__global__ void fewer_by_an_increase(float*) { ptx::registers_increase<160>(); }

#define PLANTED_ON_HOPPER(kernel, threads) \
  {#kernel, kernel, threads, 1024 + 4 * threads * sizeof(float) * (threads == 128 ? 4 : 1)}
constexpr Planted kPlanted[] = {
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
    PLANTED_ON_HOPPER(arrives_twice, 64),
    PLANTED_ON_HOPPER(halves_of_warps, 64),
    PLANTED_ON_HOPPER(missing_wgmma_fence, 128),
    PLANTED_ON_HOPPER(missing_wgmma_wait, 128),
    PLANTED_ON_HOPPER(matrix_overwritten_too_early, 128),
    PLANTED_ON_HOPPER(accumulator_read_in_flight, 128),
    PLANTED_ON_HOPPER(left_operand_written_in_flight, 128),
    PLANTED_ON_HOPPER(left_operand_after_the_fence, 128),
    PLANTED_ON_HOPPER(accumulator_after_the_fence, 128),
    PLANTED_ON_HOPPER(wgmma_at_two_places, 128),
    PLANTED_ON_HOPPER(wrong_swizzle, 128),
    {"matrix_off_its_alignment", matrix_off_its_alignment, 128, 1024 + 8192 + 1024, 9},
    PLANTED_ON_HOPPER(matrix_beyond_the_field, 128),
    PLANTED_ON_HOPPER(more_registers_than_there_are, 384),
    PLANTED_ON_HOPPER(registers_of_half_a_warpgroup, 384),
    PLANTED_ON_HOPPER(fewer_by_an_increase, 384),
};

}  // namespace
}  // namespace torchweld::cuda

int main(int count, char** arguments) {
  return torchweld::cuda::run_planted(torchweld::cuda::kPlanted, count, arguments);
}
