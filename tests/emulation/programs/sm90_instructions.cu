// Hopper's instructions (cuda/ptx_sm90.cuh) against the PTX ISA. Section names are those of cuda/ptx_sm90.cuh.
#include "cuda/ptx_sm90.cuh"
#include "harness.cuh"

namespace torchweld::cuda {
namespace {

// The first shared address that is a multiple of 1024. The memory before it holds barriers.
__device__ uint32_t tiles() {
  return (static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + 64 + 1023) / 1024 * 1024;
}
__device__ uint32_t barrier(int i) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)) + 8 * i; }
template <class T>
__device__ T* at(uint32_t address) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(shared_memory) + (address - barrier(0)));
}
constexpr size_t kShared = 40 * 1024;

// ---- Barriers

// Warp 0 arrives and continues; warp 1 waits for it.
__global__ void named_barriers(int* out) {
  int* values = at<int>(tiles());
  if (threadIdx.x < 32) {
    values[threadIdx.x] = static_cast<int>(100 + threadIdx.x);
    ptx::barrier_arrive(1, 64);
  } else {
    ptx::barrier_sync(1, 64);
    out[threadIdx.x - 32] = values[63 - threadIdx.x];
  }
}

// Two phases: the awaited parity is 0, 1, 0.
__global__ void mbarrier_phases(int* out) {
  int* value = at<int>(tiles());
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier(0), 1);
    ptx::mbarrier_init(barrier(1), 32);
  }
  __syncthreads();
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_wait(barrier(1), round % 2 ^ 1);  // the phase before the first counts as over
      *value = 10 * round;
      ptx::mbarrier_arrive(barrier(0));
    } else if (threadIdx.x >= 32) {
      ptx::mbarrier_wait(barrier(0), round % 2);
      out[round * 32 + threadIdx.x - 32] = *value + static_cast<int>(threadIdx.x) - 32;
      ptx::mbarrier_arrive(barrier(1));
    }
  }
}

// ---- Bulk copies

__global__ void bulk_load(int* out, const int* from) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier(0), 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier(0), 256);
    ptx::bulk_load(tiles(), from, 128, barrier(0));
    ptx::bulk_load(tiles() + 128, from + 64, 128, barrier(0));
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier(0), 0);
  out[threadIdx.x] = at<int>(tiles())[threadIdx.x];
}

__global__ void bulk_add(float* out, int rounds) {
  at<float>(tiles())[threadIdx.x] = static_cast<float>(threadIdx.x);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < rounds; ++i) {
      ptx::bulk_add(out, tiles(), 128);
      ptx::bulk_commit();
    }
    ptx::bulk_store(out + 32, tiles(), 64);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

// The layout of a box in shared memory.
__global__ void tensor_load(float* out, const __grid_constant__ CUtensorMap map, int x, int y, int floats) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier(0), 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch(&map);
    ptx::mbarrier_arrive_expect(barrier(0), floats * sizeof(float));
    ptx::tensor_load(tiles(), &map, barrier(0), x, y);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier(0), 0);
  for (int i = static_cast<int>(threadIdx.x); i < floats; i += 32) out[i] = at<float>(tiles())[i];
}

__global__ void tensor_load_of_4(float* out, const __grid_constant__ CUtensorMap map) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier(0), 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier(0), 32 * sizeof(float));
    ptx::tensor_load(tiles(), &map, barrier(0), 4, 1, -1, 1);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier(0), 0);
  out[threadIdx.x] = at<float>(tiles())[threadIdx.x];
}

// A box of 8 rows of 32 floats. Each float is its own place in shared memory.
__global__ void tensor_store(float*, const __grid_constant__ CUtensorMap map, int x, int y, bool add) {
  for (int i = static_cast<int>(threadIdx.x); i < 256; i += 32) at<float>(tiles())[i] = static_cast<float>(1 + i);
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    add ? ptx::tensor_add(&map, tiles(), x, y) : ptx::tensor_store(&map, tiles(), x, y);
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
    ptx::bulk_wait<0>();
  }
}

CUtensorMap map_of(float* memory, std::vector<cuuint64_t> sizes, std::vector<cuuint64_t> strides,
                   std::vector<cuuint32_t> box, CUtensorMapSwizzle swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  check("tensor map",
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
  CUtensorMap map;
  const std::vector<cuuint32_t> ones(sizes.size(), 1);
  const auto status = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, static_cast<cuuint32_t>(sizes.size()), memory, sizes.data(),
      strides.data(), box.data(), ones.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("the tensor map was refused");
  return map;
}

// The place of element `i` of row `row` in a box whose rows have `width` floats: chunks of 16 bytes are permuted by the
// number of their 128-byte line.
int swizzled(int row, int i, int width) {
  const int line = row * width / 32, chunks = width / 4;
  return row * width + ((i / 4) ^ (line % chunks)) * 4 + i % 4;
}

void test_tensor_loads(const char* name, CUtensorMapSwizzle swizzle, int width) {
  constexpr int kColumns = 20, kRows = 11, kBoxRows = 16, x = -4, y = 3;
  const Buffer<float> tensor(table(kColumns * kRows, [](int i) { return 1.0f + static_cast<float>(i); }));
  std::vector<float> expected(kBoxRows * width);
  for (int row = 0; row < kBoxRows; ++row)
    for (int i = 0; i < width; ++i) {
      const bool exists = x + i >= 0 && x + i < kColumns && y + row < kRows;
      const int place = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? row * width + i : swizzled(row, i, width);
      expected[place] = exists ? static_cast<float>(1 + (y + row) * kColumns + x + i) : 0.0f;
    }
  const auto map = map_of(tensor.device(), {kColumns, kRows}, {kColumns * sizeof(float)},
                          {static_cast<cuuint32_t>(width), kBoxRows}, swizzle);
  expect_of(name, tensor_load, 32, kShared, expected, map, x, y, kBoxRows * width);
}

void test_tensor_stores(const char* name, bool add) {
  constexpr int kColumns = 36, kRows = 10, x = 8, y = -3;
  const Buffer<float> tensor(std::vector<float>(kColumns * kRows, 0.5f));
  auto expected = std::vector<float>(kColumns * kRows, 0.5f);
  for (int row = 3; row < 8; ++row)
    for (int i = 0; i < kColumns - x; ++i)
      expected[(y + row) * kColumns + x + i] = (add ? 0.5f : 0.0f) + static_cast<float>(1 + swizzled(row, i, 32));
  const auto map =
      map_of(tensor.device(), {kColumns, kRows}, {kColumns * sizeof(float)}, {32, 8}, CU_TENSOR_MAP_SWIZZLE_128B);
  expect_of(name, tensor_store, 32, kShared, std::vector<float>(1), map, x, y, add);
  expect(name, tensor.host(), expected);
}

void test_4_dimensions() {
  constexpr int kSizes[] = {8, 3, 4, 5};
  const Buffer<float> tensor(table(8 * 3 * 4 * 5, [](int i) { return 1.0f + static_cast<float>(i); }));
  std::vector<float> expected;
  for (int w = 1; w < 3; ++w)
    for (int z = -1; z < 1; ++z)
      for (int y = 1; y < 3; ++y)
        for (int x = 4; x < 8; ++x)
          expected.push_back(z < 0 ? 0.0f : static_cast<float>(1 + x + 8 * (y + kSizes[1] * (z + kSizes[2] * w))));
  const auto map = map_of(tensor.device(), {8, 3, 4, 5}, {32, 96, 384}, {4, 2, 2, 2}, CU_TENSOR_MAP_SWIZZLE_NONE);
  expect_of("cp.async.bulk.tensor.4d load", tensor_load_of_4, 32, kShared, expected, map);
}

// More registers for two warpgroups, fewer for the third. A block of 384 threads begins with 168.
__global__ void __launch_bounds__(384, 1) registers(int* out) {
  if (threadIdx.x < 256) {
    ptx::registers_increase<240>();
  } else {
    ptx::registers_decrease<24>();
  }
  out[threadIdx.x] = static_cast<int>(threadIdx.x);
}

}  // namespace
}  // namespace torchweld::cuda

int main() {
  using namespace torchweld::cuda;
  expect_of("bar.sync, bar.arrive", named_barriers, 64, kShared, table(32, [](int t) { return 131 - t; }));
  expect_of("mbarrier.try_wait.parity", mbarrier_phases, 64, kShared,
            table(96, [](int t) { return t / 32 * 10 + t % 32; }));
  const Buffer<int> numbers(table(128, [](int i) { return i; }));
  expect_of("cp.async.bulk load", bulk_load, 64, kShared, table(64, [](int i) { return i < 32 ? i : i + 32; }),
            static_cast<const int*>(numbers.device()));
  expect_of("cp.reduce.async.bulk.add", bulk_add, 32, kShared,
            table(48, [](int i) { return i < 32 ? 3.0f * static_cast<float>(i) : static_cast<float>(i - 32); }), 3);
  test_tensor_loads("cp.async.bulk.tensor load", CU_TENSOR_MAP_SWIZZLE_NONE, 12);
  test_tensor_loads("cp.async.bulk.tensor load, 32B swizzle", CU_TENSOR_MAP_SWIZZLE_32B, 8);
  test_tensor_loads("cp.async.bulk.tensor load, 64B swizzle", CU_TENSOR_MAP_SWIZZLE_64B, 16);
  test_tensor_loads("cp.async.bulk.tensor load, 128B swizzle", CU_TENSOR_MAP_SWIZZLE_128B, 32);
  test_4_dimensions();
  test_tensor_stores("cp.async.bulk.tensor store", false);
  test_tensor_stores("cp.reduce.async.bulk.tensor.add", true);
  expect_of("setmaxnreg", registers, 384, 0, table(384, [](int t) { return t; }));
  return wrong_instructions != 0;
}
