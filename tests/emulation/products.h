// The building blocks of csrc/cuda/attention_tile.cuh in a kernel of one warp, to be held to plain products: rows [a] of 16
// times rows [b] of 16, and what comes of it times b.
#pragma once

#include "bindings/tensor.h"
#include "cuda/attention_tile.cuh"

namespace emulation {

using namespace torchweld;
using namespace torchweld::cuda;

struct Products {
  const void *a, *b;  // [16, size], rows `stride` apart
  int64_t stride;
  int size, rows;  // rows of b from `rows` on are not read
  bool packets;
  float *inner, *outer;  // [16, 16] a @ b^T, [16, size] inner @ b
};

template <class T, int D>
void products_kernel(Products p) {
  const uint32_t a = ptx::shared_base(), b = a + 16 * Tile<T, D>::kRowBytes;
  load_tile<T, D, 16, kLanes>(a, {static_cast<const T*>(p.a), p.stride, 0, 16, p.size, p.packets}, 0);
  load_tile<T, D, 16, kLanes>(b, {static_cast<const T*>(p.b), p.stride, 0, p.rows, p.size, p.packets}, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  float inner[1][2][4], outer[1][D / 8][4] = {};
  multiply_rows<T, D>(inner, a, b);
  multiply_columns<T, D>(outer, inner, b);
  auto store = [&](const auto& acc, float* to, int size, bool pairs) {
    store_rows<float>(acc, size, pairs, [&](int, int half) { return to + (lane_row() + 8 * half) * size; }, [](int, int) { return 1.0f; });
  };
  store(inner, p.inner, 16, true);
  store(outer, p.outer, p.size, p.size % 2 == 0);
}

inline void products(const TensorView& a, const TensorView& b, int64_t rows, bool packets, int padded, const TensorView& inner,
                     const TensorView& outer) {
  const Arguments args("products", dlpack::kCPU, a);
  const DType dtype = args.dtype(a, "a");
  Products p{};
  p.a = args.strided(a, "a", dtype, {a.size(0), a.size(1)});
  p.b = args.strided(b, "b", dtype, {a.size(0), a.size(1)});
  p.stride = a.stride(0);
  p.size = static_cast<int>(a.size(1));
  p.rows = static_cast<int>(rows);
  p.packets = packets;
  p.inner = static_cast<float*>(args.flat(inner, "inner", DType::float32, 256));
  p.outer = static_cast<float*>(args.flat(outer, "outer", DType::float32, 16 * a.size(1)));
  dispatch("products", dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    auto run = [&](auto size) {
      constexpr int D = decltype(size)::value;
      launch("products", products_kernel<T, D>, dim3(1), dim3(kLanes), 32 * Tile<T, D>::kRowBytes, nullptr, p);
    };
    if (padded == 32) run(std::integral_constant<int, 32>{});
    else if (padded == 64) run(std::integral_constant<int, 64>{});
    else run(std::integral_constant<int, 128>{});
  });
}

}  // namespace emulation
