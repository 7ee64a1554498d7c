// wgmma (cuda/ptx_sm90.cuh) against the PTX ISA: products of matrices of small whole numbers, which are exact.
#include "cuda/ptx_sm90.cuh"
#include "harness.cuh"

namespace torchweld::cuda {
namespace {

// What a test multiplies: 64 rows of A by kColumns columns of B.
struct Plain {
  static constexpr int kColumns = 64;
  static constexpr int kWidth = 128;   // bytes of a row of the swizzle; 16: not swizzled
  static constexpr int kFirstRow = 0;  // of A in its tile, and of B
  static constexpr bool kRegisters = false, kTransposedA = false, kTransposedB = false;
};
struct NotSwizzled : Plain {
  static constexpr int kWidth = 16;
};
struct Swizzled32 : Plain {
  static constexpr int kWidth = 32;
};
struct Swizzled64 : Plain {
  static constexpr int kWidth = 64;
};
struct Columns128 : Plain {
  static constexpr int kColumns = 128;
};
struct Columns256 : Plain {
  static constexpr int kColumns = 256;
};
struct RowOffset : Columns128 {
  static constexpr int kFirstRow = 64;
};
struct TransposedA : Plain {
  static constexpr bool kTransposedA = true;
};
struct TransposedB : Columns128 {
  static constexpr bool kTransposedB = true;
};
struct TransposedB256 : Columns256 {
  static constexpr bool kTransposedB = true;
};
struct TransposedBoth : TransposedB256 {
  static constexpr bool kTransposedA = true;
};
struct Registers : Plain {
  static constexpr bool kRegisters = true;
};
struct RegistersTransposedB : Registers {
  static constexpr bool kTransposedB = true;
};
struct RegistersTransposedB256 : RegistersTransposedB {
  static constexpr int kColumns = 256;
};

__host__ __device__ int left_of(int i, int k) { return (i * 3 + k * 5) % 7 - 3; }
__host__ __device__ int right_of(int n, int k) { return (n * 2 + k * 3) % 5 - 2; }

// The byte of element (i, k) of `rows` rows, K-major and swizzled, `width` bytes wide. Width 16: not swizzled, in
// columns of 16 bytes.
__device__ uint32_t k_major(int i, int k, int rows, int width) {
  if (width == 16) return (k / 8 * rows + i) * 16 + k % 8 * 2;
  return i * width + ((k / 8) ^ (i * width / 128 % (width / 16))) * 16 + k % 8 * 2;
}
// The same with neighbouring rows of A, or columns of B, 64 per line.
__device__ uint32_t k_minor(int i, int k, int depth) {
  return i / 64 * depth * 128 + k * 128 + ((i % 64 / 8) ^ (k % 8)) * 16 + i % 8 * 2;
}

template <class P>
constexpr int kDepth = P::kWidth == 16 ? 16 : P::kWidth / 2;
constexpr int kMostRows = 128, kMostColumns = 256;  // of a tile
constexpr size_t kShared = 1024 + 128 * (kMostRows + kMostColumns);

// As many products as kWidth bytes hold, 16 columns each, one after the other.
template <class T, class P>
__global__ void product(float* out) {
  constexpr int N = P::kColumns, kSteps = kDepth<P> / 16, kRows = 64 + P::kFirstRow, kAll = N + P::kFirstRow;
  static_assert(kRows <= kMostRows && kAll <= kMostColumns);
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory)),
                 left = (base + 1023) / 1024 * 1024;
  const uint32_t right = left + 128 * kMostRows;
  auto put = [&](uint32_t address, int value) {
    *reinterpret_cast<uint16_t*>(reinterpret_cast<char*>(shared_memory) + (address - base)) =
        static_cast<uint16_t>(pack<T>(static_cast<float>(value), 0.0f));
  };
  for (int k = 0; k < kDepth<P>; ++k) {
    for (int i = static_cast<int>(threadIdx.x); i < kRows; i += 128)
      put(left + (P::kTransposedA ? k_minor(i, k, kDepth<P>) : k_major(i, k, kRows, P::kWidth)),
          left_of(i - P::kFirstRow, k));
    for (int n = static_cast<int>(threadIdx.x); n < kAll; n += 128)
      put(right + (P::kTransposedB ? k_minor(n, k, kDepth<P>) : k_major(n, k, kAll, P::kWidth)),
          right_of(n - P::kFirstRow, k));
  }
  ptx::fence_proxy_async();
  __syncthreads();

  constexpr auto kSwizzle = P::kWidth == 128  ? ptx::Swizzle::bytes128
                            : P::kWidth == 64 ? ptx::Swizzle::bytes64
                            : P::kWidth == 32 ? ptx::Swizzle::bytes32
                                              : ptx::Swizzle::none;
  constexpr uint32_t kStride = P::kWidth == 16 ? 128 : 8 * P::kWidth;
  auto matrix = [&](uint32_t tile, bool transposed, int rows, int k) {
    if (transposed) return ptx::descriptor(tile + k * 128, kDepth<P> * 128, 1024, ptx::Swizzle::bytes128);
    return ptx::descriptor(tile + P::kFirstRow * P::kWidth + k * 2, rows * 16, kStride, kSwizzle);
  };
  float c[N / 8][4];
  const int lane = static_cast<int>(threadIdx.x) % 32, row = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  // All of A is loaded before the first product: its registers belong to the products until they are waited for.
  uint32_t a[kSteps][4] = {};
  if constexpr (P::kRegisters)
    for (int step = 0; step < kSteps; ++step)
      for (int w = 0; w < 4; ++w) {
        const int i = row + w % 2 * 8, first = 16 * step + w / 2 * 8 + lane % 4 * 2;
        a[step][w] = pack<T>(static_cast<float>(left_of(i, first)), static_cast<float>(left_of(i, first + 1)));
      }
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint64_t b = matrix(right, P::kTransposedB, kAll, 16 * step);
    if constexpr (P::kRegisters)
      ptx::wgmma<T, N, P::kTransposedB>(c, a[step], b, step > 0);
    else
      ptx::wgmma<T, N, P::kTransposedA, P::kTransposedB>(c, matrix(left, P::kTransposedA, kRows, 16 * step), b,
                                                         step > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int j = 0; j < N / 8; ++j)
    for (int e = 0; e < 4; ++e) out[(row + e / 2 * 8) * N + j * 8 + lane % 4 * 2 + e % 2] = c[j][e];
}

template <class T, class P>
void test_product(const char* name) {
  constexpr int N = P::kColumns;
  const auto expected = table(64 * N, [&](int e) {
    int sum = 0;
    for (int k = 0; k < kDepth<P>; ++k) sum += left_of(e / N, k) * right_of(e % N, k);
    return static_cast<float>(sum);
  });
  expect_of(name, product<T, P>, 128, kShared, expected);
}

}  // namespace
}  // namespace torchweld::cuda

int main() {
  using namespace torchweld::cuda;
  using Bfloat16 = __nv_bfloat16;
  test_product<Bfloat16, NotSwizzled>("wgmma m64n64k16, no swizzle");
  test_product<Bfloat16, Swizzled32>("wgmma m64n64k16, 32B swizzle");
  test_product<Bfloat16, Swizzled64>("wgmma m64n64k16, 64B swizzle");
  test_product<Bfloat16, Columns128>("wgmma m64n128k16, 128B swizzle");
  test_product<Bfloat16, RowOffset>("wgmma m64n128k16, from row 64 on");
  test_product<Bfloat16, TransposedA>("wgmma m64n64k16, A transposed");
  test_product<Bfloat16, TransposedB>("wgmma m64n128k16, B transposed");
  test_product<Bfloat16, TransposedB256>("wgmma m64n256k16, B transposed");
  test_product<__half, TransposedBoth>("wgmma m64n256k16, A and B transposed");
  test_product<__half, Registers>("wgmma m64n64k16, A in registers");
  test_product<__half, RegistersTransposedB>("wgmma m64n64k16, A in registers, B transposed");
  test_product<Bfloat16, RegistersTransposedB256>("wgmma m64n256k16, A in registers, B transposed");
  test_product<Bfloat16, Columns256>("wgmma m64n256k16");
  return wrong_instructions != 0;
}
