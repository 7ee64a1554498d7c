// CUDA's functions for warps and blocks against the CUDA C++ Programming Guide, whose sections are named.
#include "harness.cuh"

namespace torchweld::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

// "Warp Shuffle Functions": a lane gets the value of lane ^ mask, within groups of `width`.
__global__ void shuffle_xor(int* out) { out[threadIdx.x] = __shfl_xor_sync(kAll, 100 + lane(), 5); }
__global__ void shuffle_xor_of_8(int* out) { out[threadIdx.x] = __shfl_xor_sync(kAll, 100 + lane(), 3, 8); }
// Up and down do not wrap around: a lane without a source keeps its own value.
__global__ void shuffle_down(int* out) { out[threadIdx.x] = __shfl_down_sync(kAll, 100 + lane(), 3, 16); }
__global__ void shuffle_up(int* out) { out[threadIdx.x] = __shfl_up_sync(kAll, 100 + lane(), 3, 16); }
// The source lane is taken modulo the width, within the lane's own group.
__global__ void shuffle_index(int* out) { out[threadIdx.x] = __shfl_sync(kAll, 100 + lane(), 9, 8); }
__global__ void shuffle_of_8_bytes(double* out) { out[threadIdx.x] = __shfl_xor_sync(kAll, lane() + 0.5, 1); }
__global__ void shuffle_of_half_a_warp(int* out) {
  out[threadIdx.x] = lane() < 16 ? __shfl_xor_sync(0x0000ffffu, lane(), 1) : __shfl_xor_sync(0xffff0000u, lane(), 2);
}

// "Warp Vote Functions"
__global__ void ballot(unsigned* out) { out[threadIdx.x] = __ballot_sync(kAll, lane() % 3 == 0); }
__global__ void any_and_all(int* out) {
  out[threadIdx.x] = (__any_sync(kAll, lane() == 7) != 0) + 2 * (__any_sync(kAll, 0) != 0) +
                     4 * (__all_sync(kAll, lane() < 32) != 0) + 8 * (__all_sync(kAll, lane() != 7) != 0);
}

// "Warp Reduce Functions"
__global__ void reduce_add(unsigned* out) { out[threadIdx.x] = __reduce_add_sync(kAll, 1u << lane()); }
__global__ void reduce_max(unsigned* out) {
  out[threadIdx.x] = __reduce_max_sync(kAll, 70u ^ static_cast<unsigned>(lane()));
}

// "Synchronization Functions": the predicate is evaluated for all threads of the block.
__global__ void syncthreads_votes(int* out) {
  const int count = __syncthreads_count(threadIdx.x % 2 == 0);
  const int all = __syncthreads_and(threadIdx.x < 64), any = __syncthreads_or(threadIdx.x == 99);
  out[threadIdx.x] = count + 1000 * (all != 0) + 2000 * (any != 0);
}

// "Atomic Functions": each thread gets the old value, and no addition is lost.
__global__ void atomics(int* out) {
  __shared__ int total, largest;
  if (threadIdx.x == 0) total = 0, largest = -1;
  __syncthreads();
  atomicAdd(&total, static_cast<int>(threadIdx.x));
  atomicMax(&largest, static_cast<int>(threadIdx.x));
  __syncthreads();
  out[threadIdx.x] = total + largest;
}
__global__ void compare_and_swap(int* out) {
  for (bool done = false; !done;) {
    const int old = *static_cast<volatile int*>(out);
    done = atomicCAS(out, old, old + 2) == old;
  }
}

// "Integer Intrinsics": byte i of the result is the byte of y:x that nibble i of the selector names.
__global__ void byte_permute(unsigned* out) {
  out[threadIdx.x] = __byte_perm(0x33221100u, 0x77665544u, 0x6420u + threadIdx.x);
}
__global__ void multiply_high(unsigned* out) { out[threadIdx.x] = __umulhi(0x80000001u, 3u + threadIdx.x); }
__global__ void bits(int* out) {
  const auto x = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = __popc(x) + 100 * __clz(x) + 10000 * __ffs(x);
}

int zeros(int x) {
  int n = 32;
  for (; x > 0; x /= 2) --n;
  return n;
}
int ones(int x) { return x == 0 ? 0 : x % 2 + ones(x / 2); }
int lowest_bit(int x) { return x == 0 ? 0 : x % 2 == 1 ? 1 : 1 + lowest_bit(x / 2); }

}  // namespace
}  // namespace torchweld::cuda

int main() {
  using namespace torchweld::cuda;
  expect_of("shfl.xor", shuffle_xor, 64, 0, table(64, [](int t) { return 100 + (t % 32 ^ 5); }));
  expect_of("shfl.xor width 8", shuffle_xor_of_8, 32, 0, table(32, [](int t) { return 100 + (t ^ 3); }));
  expect_of("shfl.down", shuffle_down, 32, 0, table(32, [](int t) { return 100 + (t % 16 + 3 < 16 ? t + 3 : t); }));
  expect_of("shfl.up", shuffle_up, 32, 0, table(32, [](int t) { return 100 + (t % 16 >= 3 ? t - 3 : t); }));
  expect_of("shfl.idx", shuffle_index, 32, 0, table(32, [](int t) { return 100 + t / 8 * 8 + 1; }));
  expect_of("shfl of 8 bytes", shuffle_of_8_bytes, 32, 0, table(32, [](int t) { return (t ^ 1) + 0.5; }));
  expect_of("shfl of half a warp", shuffle_of_half_a_warp, 32, 0,
            table(32, [](int t) { return t < 16 ? t ^ 1 : t ^ 2; }));
  expect_of("vote.ballot", ballot, 32, 0, table(32, [](int) { return 0x49249249u; }));
  expect_of("vote.any, vote.all", any_and_all, 32, 0, table(32, [](int) { return 1 + 4; }));
  expect_of("redux.add", reduce_add, 32, 0, table(32, [](int) { return 0xffffffffu; }));
  expect_of("redux.max", reduce_max, 32, 0, table(32, [](int) { return 95u; }));
  expect_of("barrier.red", syncthreads_votes, 128, 0, table(128, [](int) { return 64 + 2000; }));
  expect_of("atom.add, atom.max", atomics, 128, 0, table(128, [](int) { return 127 * 128 / 2 + 127; }));
  expect_of("atom.cas", compare_and_swap, 96, 0, std::vector<int>{192});
  expect_of("prmt", byte_permute, 2, 0, std::vector<unsigned>{0x66442200u, 0x66442211u});
  expect_of("mul.hi", multiply_high, 4, 0,
            table(4, [](int t) { return static_cast<unsigned>(0x80000001ull * (3 + t) >> 32); }));
  expect_of("popc, clz, ffs", bits, 64, 0,
            table(64, [](int t) { return ones(t) + 100 * zeros(t) + 10000 * lowest_bit(t); }));
  return wrong_instructions != 0;
}
