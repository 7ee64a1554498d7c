// What blocks of one grid may do together, by the CUDA C++ Programming Guide ("Memory Fence Functions", "Atomic
// Functions") and the PTX ISA ("Memory Consistency Model").
#include "harness.cuh"

namespace torchweld::cuda {
namespace {

constexpr int kBlocks = 12, kThreads = 64;

// The guide's example of a fence: each block sums its part, and the last one sums the parts.
__global__ void last_block_sums(int* out, int* parts, int* arrived) {
  __shared__ bool last;
  parts[blockIdx.x * kThreads + threadIdx.x] = static_cast<int>(blockIdx.x * 1000 + threadIdx.x);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1) + 1 == static_cast<int>(gridDim.x);
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  int sum = 0;
  for (int b = 0; b < static_cast<int>(gridDim.x); ++b) sum += parts[b * kThreads + threadIdx.x];
  out[threadIdx.x] = sum;
}

// Every thread releases what it has written itself, without a barrier.
__global__ void threads_release(int* out, int* parts, int* arrived) {
  parts[blockIdx.x * kThreads + threadIdx.x] = static_cast<int>(threadIdx.x);
  __threadfence();
  const int place = atomicAdd(arrived, 1);
  __threadfence();
  if (place + 1 < kBlocks * kThreads) return;
  int sum = 0;
  for (int i = 0; i < kBlocks * kThreads; ++i) sum += parts[i];
  out[0] = sum;
}

// Blocks take tickets when they start, and work one after the other in their order.
__global__ void in_the_order_of_tickets(int* out, int* next, int* turn) {
  if (threadIdx.x == 0) {
    const int ticket = atomicAdd(next, 1);
    while (*static_cast<volatile int*>(turn) != ticket) {
    }
    __threadfence();
  }
  __syncthreads();
  out[threadIdx.x] = 3 * out[threadIdx.x] + 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(turn, 1);
  }
}

// A barrier of all blocks, which run at once on any GPU. It is used twice.
__device__ void grid_barrier(int* arrived, int round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1);
    while (atomicAdd(arrived, 0) < round * static_cast<int>(gridDim.x)) {
    }
    __threadfence();
  }
  __syncthreads();
}
__global__ void barriers_of_the_grid(int* out, int* values, int* arrived) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), all = kBlocks * kThreads;
  values[i] = i;
  grid_barrier(arrived, 1);
  const int far = values[(i + kThreads) % all];
  grid_barrier(arrived, 2);
  values[i] = far;
  out[i] = values[i];
}

// A value passed from block to block by volatile stores and loads: a store releases what came before its fence.
__global__ void chain(int* out, int* next, int* passed) {
  if (threadIdx.x > 0) return;
  const int ticket = atomicAdd(next, 1);
  volatile int* flags = passed;
  while (ticket > 0 && flags[ticket - 1] == 0) {
  }
  __threadfence();
  out[ticket] = ticket > 0 ? out[ticket - 1] + 2 : 1;
  __threadfence();
  flags[ticket] = 1;
}

// Within a block its own fence is enough.
__global__ void flag_within_a_block(int* out, int* flags) {
  volatile int* flag = flags + blockIdx.x;
  if (threadIdx.x == 40) {
    out[blockIdx.x] = 7 + static_cast<int>(blockIdx.x);
    __threadfence_block();
    *flag = 1;
  } else if (threadIdx.x == 0) {
    while (*flag == 0) {
    }
    __threadfence_block();
    out[blockIdx.x] *= 2;
  }
}

// Atomic accesses of all blocks to the same words, and halves of words that two threads of two blocks write.
__global__ void atomics_of_all(int* out) {
  atomicAdd(out, 1);
  atomicMax(out + 1, static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x));
}
__global__ void halves(uint16_t* out) {
  out[threadIdx.x * gridDim.x + blockIdx.x] = static_cast<uint16_t>(threadIdx.x + 100 * blockIdx.x);
}

// Each block has its own shared memory, barriers and indices, however blocks alternate.
__global__ void own_state(int* out, int* spins) {
  __shared__ int total;
  int* numbers = reinterpret_cast<int*>(shared_memory);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  numbers[threadIdx.x] = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  for (int round = 0; round < 8; ++round) {
    atomicAdd(spins, 1);
    atomicAdd(&total, round);
    const int neighbour = numbers[threadIdx.x ^ 32];
    __syncthreads();
    numbers[threadIdx.x] = neighbour + 1 + __shfl_xor_sync(0xffffffffu, warp, 5) - warp;
    __syncthreads();
  }
  const auto i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = numbers[threadIdx.x] + 100 * total + 1000000 * static_cast<int>(gridDim.x - blockIdx.x);
}

}  // namespace
}  // namespace torchweld::cuda

int main() {
  using namespace torchweld::cuda;
  const auto zeros = [](int size) { return std::vector<int>(size); };
  const auto expect_all = [&](const char* name, auto kernel, const std::vector<int>& expected) {
    const Buffer<int> a(zeros(kBlocks * kThreads)), b(zeros(kBlocks));
    expect_of_blocks(name, kernel, kBlocks, kThreads, 0, expected, a.device(), b.device());
  };
  constexpr int kSum = kThreads * (kThreads - 1) / 2;
  expect_all("the last block", last_block_sums,
             table(kThreads, [](int t) { return 1000 * kBlocks * (kBlocks - 1) / 2 + kBlocks * t; }));
  expect_all("fences of all threads", threads_release, {kBlocks * kSum});
  expect_all("tickets", in_the_order_of_tickets, std::vector<int>(kThreads, 265720));  // (3^12 - 1) / 2
  expect_all("barriers of the grid", barriers_of_the_grid,
             table(kBlocks * kThreads, [](int i) { return (i + kThreads) % (kBlocks * kThreads); }));
  expect_all("chain", chain, table(kBlocks, [](int b) { return 1 + 2 * b; }));
  const Buffer<int> flags(zeros(kBlocks)), spins(zeros(1));
  expect_of_blocks("fence.cta", flag_within_a_block, kBlocks, kThreads, 0,
                   table(kBlocks, [](int b) { return 14 + 2 * b; }), flags.device());
  expect_of_blocks("atomics of a grid", atomics_of_all, kBlocks, kThreads, 0,
                   std::vector<int>{kBlocks * kThreads, kBlocks * kThreads - 1});
  expect_of_blocks("halves of words", halves, 3, kThreads, 0,
                   table(3 * kThreads, [](int i) { return static_cast<uint16_t>(i / 3 + 100 * (i % 3)); }));
  expect_of_blocks("state of a block", own_state, kBlocks, kThreads, kThreads * sizeof(int),
                   table(kBlocks * kThreads,
                         [](int i) {
                           const int b = i / kThreads;
                           return b + 8 + 100 * 28 * kThreads + 1000000 * (kBlocks - b);
                         }),
                   spins.device());
  return wrong_instructions != 0;
}
