// Tiles as Hopper's tensor cores read them, out of shared memory by descriptor, and their products.
//
// A tile of R rows is cut into panels of 64 columns: a panel's rows are 128 bytes, and chunk c (16 bytes) of row r lies
// at place c ^ r % 8, which wgmma calls the swizzle of 128 bytes. Tiles begin on 1024 bytes.
#pragma once

#include "cuda/attention/scores.cuh"
#include "cuda/ptx_sm90.cuh"

namespace torchweld::cuda {

constexpr int kWarpgroup = 128;  // threads

// The same for all lanes of a warp, as the compiler is told.
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

  // An operand whose K runs along the columns of the tile, or along its rows: of the 16 of a step. Addresses in a
  // descriptor count 16 bytes, and no sum runs over into the next field: there are less than 256 KB.
  static __device__ __forceinline__ uint64_t columns(uint64_t tile, int step) {
    return tile + (step / 4 * kPanelBytes + step % 4 * 32) / 16;
  }
  static __device__ __forceinline__ uint64_t rows(uint64_t tile, int step) { return tile + step * 16 * kRowBytes / 16; }
  static __device__ __forceinline__ uint64_t descriptor(uint32_t tile) {
    return ptx::descriptor(tile, kPanelBytes, 8 * kRowBytes, ptx::Swizzle::bytes128);
  }
};

// A left operand in registers: 16 rows per warp of an accumulator's columns, 16 to a step.
template <int NT>
struct Lefts {
  uint32_t words[NT / 2][4];

  template <class T>
  __device__ __forceinline__ void take(const float (&acc)[1][NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        words[n / 2][n % 2 * 2 + half] = pack<T>(acc[0][n][2 * half], acc[0][n][2 * half + 1]);
  }
};

// Its columns, 8 * NT, to 16 rows of a tile of one panel, from `row` on.
template <int NT>
__device__ __forceinline__ void store_panel(uint32_t tile, int row, const Lefts<NT>& left) {
  static_assert(NT == 8);
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      ptx::store_shared(tile + Panels<64, 8>::at(row + lane_row() + 8 * half, n) + lane_column() * 2,
                        left.words[n / 2][n % 2 * 2 + half]);
}

// acc = left @ right^T: 64 rows of the tile at `left`, from `row` on, with all 8 * NT rows of the one at `right`. Like
// all products here it is begun, not awaited: acc, and words of a left operand, may not be touched before that.
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
__device__ __forceinline__ void begin_columns(float (&acc)[1][D / 8][4], const Lefts<NT>& left, uint32_t tile) {
  const uint64_t b = Panels<D, 8 * NT>::descriptor(tile);
#pragma unroll
  for (int step = 0; step < NT / 2; ++step)
    ptx::wgmma<T, D, true>(acc[0], left.words[step], Panels<D, 8 * NT>::rows(b, step), true);
}

}  // namespace torchweld::cuda
