#include "cuda/attention/sm80/products.cuh"
#include "products.h"

namespace emulation {
namespace {

using namespace torchweld::cuda;
using namespace torchweld::cuda::attention;
using namespace torchweld::cuda::attention::sm80;

template <class T, int D>
void multiply(Products p) {
  const uint32_t a = ptx::shared_base(), b = a + 16 * Tile<T, D>::kRowBytes;
  load_tile<T, D, 16, kWarpSize>(a, {static_cast<const T*>(p.a), p.stride, 0, 16, p.size, p.vectorized}, 0);
  load_tile<T, D, 16, kWarpSize>(b, {static_cast<const T*>(p.b), p.stride, 0, p.rows, p.size, p.vectorized}, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  float inner[1][2][4], outer[1][D / 8][4] = {};
  multiply_rows<T, D>(inner, a, b);
  multiply_columns<T, D>(outer, inner, b, D);
  auto store = [](const auto& acc, float* to, int size) {
    store_rows<float>(
        acc, size, size % 2 == 0, [&](int, int half) { return to + (lane_row() + 8 * half) * size; },
        [](int, int) { return 1.0f; });
  };
  store(inner, p.inner, 16);
  store(outer, p.outer, p.size);
}

}  // namespace

void products(const Products& p, torchweld::DType dtype) {
  dispatch("products", dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    auto run = [&](auto size) {
      constexpr int D = decltype(size)::value;
      torchweld::cuda::launch("products", multiply<T, D>, dim3(1), dim3(kWarpSize), 32 * Tile<T, D>::kRowBytes, nullptr,
                              p);
    };
    if (p.padded == 32)
      run(std::integral_constant<int, 32>{});
    else if (p.padded == 64)
      run(std::integral_constant<int, 64>{});
    else
      run(std::integral_constant<int, 128>{});
  });
}

}  // namespace emulation
