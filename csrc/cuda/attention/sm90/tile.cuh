// Tiles of shared memory as wgmma reads them by descriptor, and their products.
//
// A tile of R rows is cut into panels of 64 columns. A panel's row has 128 bytes, and chunk c (16 bytes) of row r is at
// place c ^ r % 8: the 128-byte swizzle of wgmma. Tiles begin on 1024 bytes.
#pragma once

#include "cuda/attention/scores.cuh"
#include "cuda/ptx_sm90.cuh"

namespace torchweld::cuda::attention::sm90 {

constexpr int kWarpgroup = 128;  // threads

// The shuffle tells the compiler that all lanes of a warp have the same number.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
}

template <int D, int R>
struct Panels {
  static constexpr int kColumns = 64, kRowBytes = 128, kPanelBytes = R * kRowBytes, kBytes = D / kColumns * kPanelBytes;
  static_assert(D % kColumns == 0 && R % 8 == 0);

  // Offset of a chunk of the tile.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    return static_cast<uint32_t>(chunk / 8 * kPanelBytes + row * kRowBytes + ((chunk % 8 ^ row % 8) << 4));
  }

  // The place `rows` rows below `place`, a multiple of 4 rows, where `place` is in the first 4 rows of 8 or `rows` is a
  // multiple of 8. Tiles begin on 1024 bytes, so a swizzle flips bits of the address.
  static __device__ __forceinline__ uint32_t below(uint32_t place, int rows) {
    return (place ^ static_cast<uint32_t>(rows % 8 << 4)) + static_cast<uint32_t>(rows * kRowBytes);
  }

  // The descriptor of step `step` (16 elements of K) of an operand whose K runs along the columns, or along the rows,
  // of the tile. A descriptor counts addresses in 16 bytes; below 256 KB no sum overflows into the next field.
  static __device__ __forceinline__ uint64_t columns(uint64_t tile, int step) {
    return tile + (step / 4 * kPanelBytes + step % 4 * 32) / 16;
  }
  static __device__ __forceinline__ uint64_t rows(uint64_t tile, int step) { return tile + step * 16 * kRowBytes / 16; }
  static __device__ __forceinline__ uint64_t descriptor(uint32_t tile) {
    return ptx::descriptor(tile, kPanelBytes, 8 * kRowBytes, ptx::Swizzle::bytes128);
  }
};

// A left operand in registers: 16 rows per warp of an accumulator, 16 columns per step.
template <int NT>
struct RegisterOperand {
  uint32_t words[NT / 2][4];

  template <class T>
  __device__ __forceinline__ void from_accumulator(const float (&acc)[1][NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        words[n / 2][n % 2 * 2 + half] = pack<T>(acc[0][n][2 * half], acc[0][n][2 * half + 1]);
  }
};

// Stores 8 * NT columns to 16 rows, from `row` on, of a tile of one panel.
template <int NT>
__device__ __forceinline__ void store_panel(uint32_t tile, int row, const RegisterOperand<NT>& left) {
  static_assert(NT == 8);
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      ptx::store_shared(tile + Panels<64, 8>::at(row + lane_row() + 8 * half, n) + lane_column() * 2,
                        left.words[n / 2][n % 2 * 2 + half]);
}

// acc = left @ right^T for 64 rows of the tile at `left`, from `row` on, and all 8 * NT rows of the tile at `right`.
// This and begin_columns() start a product: acc and a left operand in registers may not be touched until it is waited
// for.
template <class T, int D, int L, int NT>
__device__ __forceinline__ void begin_rows(float (&acc)[1][NT][4], uint32_t left, int row, uint32_t right) {
  const uint64_t a = Panels<D, L>::descriptor(left + row * Panels<D, L>::kRowBytes);
  const uint64_t b = Panels<D, 8 * NT>::descriptor(right);
#pragma unroll
  for (int step = 0; step < D / 16; ++step)
    ptx::wgmma<T, 8 * NT>(acc[0], Panels<D, L>::columns(a, step), Panels<D, 8 * NT>::columns(b, step), step > 0);
}

// acc += left @ tile, over the 8 * NT rows of the tile.
template <class T, int D, int NT>
__device__ __forceinline__ void begin_columns(float (&acc)[1][D / 8][4], const RegisterOperand<NT>& left,
                                              uint32_t tile) {
  const uint64_t b = Panels<D, 8 * NT>::descriptor(tile);
#pragma unroll
  for (int step = 0; step < NT / 2; ++step)
    ptx::wgmma<T, D, true>(acc[0], left.words[step], Panels<D, 8 * NT>::rows(b, step), true);
}

}  // namespace torchweld::cuda::attention::sm90
