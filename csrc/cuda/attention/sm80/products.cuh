// Products of tiles on tensor cores.
//
// Accumulators have the layout of mma: acc[m][n][e] of lane 4 * g + t is row 16 * m + g (+ 8 if e > 1), column
// 8 * n + 2 * t (+ 1 if e is odd).
//
// A step of a product takes 32 bytes of each row: 16 elements of 16 bits, or 8 floats. A float is split into two TF32
// numbers, high + low, and a product of floats into three products (low * low is below the rounding of fp32). Tensor
// cores round sums towards zero, and these errors add up. So a product of floats sums one step from zero on tensor
// cores and adds the steps outside of them. (Ootomo, Yokota: Recovering single precision accuracy from Tensor Cores,
// arXiv:2203.03341.)
#pragma once

#include "cuda/attention/instances.h"
#include "cuda/attention/tile.cuh"

namespace torchweld::cuda::attention::sm80 {

// True while the sm_90a code of a kernel that sm90/ replaces is compiled: its body stays empty.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class T, int D>
constexpr bool kReplacedOnHopper = kHasSm90<T, D>;
#else
template <class T, int D>
constexpr bool kReplacedOnHopper = false;
#endif

// The left operand of one step: 16 rows by 32 bytes, in the layout of mma. Floats are split into high and low.
template <class T>
struct LeftOperand {
  static constexpr bool kSplit = sizeof(T) == 4;
  uint32_t high[4], low[kSplit ? 4 : 1];

  // address: chunk lane / 16 of row lane % 16.
  __device__ __forceinline__ void load(uint32_t address) {
    ptx::ldmatrix(high, address);
    if constexpr (kSplit) split();
  }

  // Takes 16 columns (16-bit elements: the next two tiles of 8) or 8 columns (floats: the next tile) of an accumulator.
  // With floats column 2t takes the place of column t and 2t + 1 that of t + 4; multiply_columns permutes the rows of
  // the right operand in the same way.
  __device__ __forceinline__ void from_accumulator(const float (*c)[4]) {
    if constexpr (kSplit) {
      for (int w = 0; w < 4; ++w) high[w] = __float_as_uint(c[0][w / 2 + w % 2 * 2]);
      split();
    } else {
      for (int w = 0; w < 4; ++w) high[w] = pack<T>(c[w / 2][w % 2 * 2], c[w / 2][w % 2 * 2 + 1]);
    }
  }

 private:
  __device__ __forceinline__ void split() {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float value = __uint_as_float(high[w]);
      high[w] = ptx::to_tf32(value);
      low[w] = ptx::to_tf32(value - __uint_as_float(high[w]));
    }
  }
};

// kTransposed: the result has the bits of the product with its operands exchanged.
template <class T, bool kTransposed = false>
__device__ __forceinline__ void multiply(float (&c)[4], const LeftOperand<T>& a, uint32_t b0, uint32_t b1) {
  if constexpr (LeftOperand<T>::kSplit) {
    const float v0 = __uint_as_float(b0), v1 = __uint_as_float(b1);
    const uint32_t high0 = ptx::to_tf32(v0), high1 = ptx::to_tf32(v1);
    float sum[4] = {};
    const uint32_t low0 = ptx::to_tf32(v0 - __uint_as_float(high0)), low1 = ptx::to_tf32(v1 - __uint_as_float(high1));
    if constexpr (kTransposed) ptx::mma_tf32(sum, a.high, low0, low1);
    ptx::mma_tf32(sum, a.low, high0, high1);
    if constexpr (!kTransposed) ptx::mma_tf32(sum, a.high, low0, low1);
    ptx::mma_tf32(sum, a.high, high0, high1);
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] += sum[e];
  } else {
    ptx::mma<T>(c, a.high, b0, b1);
  }
}

// acc = left @ right^T for 16 * MT rows of the tile at `left` and 8 * NT rows of the tile at `right`.
template <class T, int D, bool kTransposed = false, int MT, int NT>
__device__ __forceinline__ void multiply_rows(float (&acc)[MT][NT][4], uint32_t left, uint32_t right) {
  static_assert(NT % 2 == 0);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
  const int own = opaque_lane();
  const typename Tile<T, D>::Cursor lefts(left, own % 16, own / 16);
  const typename Tile<T, D>::Cursor rights(right, own % 16, own / 16);
  constexpr int kUnroll =
      LeftOperand<T>::kSplit ? 1 : Tile<T, D>::kSteps;  // the sums of many steps would not fit the registers
#pragma unroll kUnroll
  for (int step = 0; step < Tile<T, D>::kSteps; ++step) {
    LeftOperand<T> a[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) a[m].load(lefts.at(16 * m, 2 * step));
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix(b, rights.at(8 * n, 2 * step));
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        multiply<T, kTransposed>(acc[m][n], a[m], b[0], b[2]);
        multiply<T, kTransposed>(acc[m][n + 1], a[m], b[1], b[3]);
      }
    }
  }
}

// acc += probabilities @ tile, for the first 8 * NT rows of the tile. Its columns from `size` on are zeros. With floats
// the loop stops there: fewer columns are in registers at once.
template <class T, int D, int MT, int NT>
__device__ __forceinline__ void multiply_columns(float (&acc)[MT][D / 8][4], const float (&probabilities)[MT][NT][4],
                                                 uint32_t tile, int size) {
  constexpr int kTiles = LeftOperand<T>::kSplit ? 1 : 2;  // tiles of 8 columns per step
  static_assert(NT % kTiles == 0);
  const int own = opaque_lane();
  const typename Tile<T, D>::Cursor even = LeftOperand<T>::kSplit
                                               ? typename Tile<T, D>::Cursor(tile, lane_column(), lane_row() / 4)
                                               : typename Tile<T, D>::Cursor(tile, own % 16, own / 16);
  const typename Tile<T, D>::Cursor odd(tile, lane_column() + 1, lane_row() / 4);  // floats only
#pragma unroll
  for (int step = 0; step < NT / kTiles; ++step) {
    LeftOperand<T> a[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) a[m].from_accumulator(probabilities[m] + step * kTiles);
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      if (LeftOperand<T>::kSplit && n % 4 == 0 && 8 * n >= size) break;
      uint32_t b[4];
      if constexpr (LeftOperand<T>::kSplit) {
        // Rows 2t and 2t + 1 at column g; two chunks hold 8 columns.
#pragma unroll
        for (int w = 0; w < 4; ++w)
          b[w] = ptx::load_shared((w % 2 == 0 ? even : odd).at(8 * step, 2 * n + w / 2 * 2) + lane_row() % 4 * 4);
      } else {
        ptx::ldmatrix_transposed(b, even.at(16 * step, n));
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        multiply<T>(acc[m][n], a[m], b[0], b[1]);
        multiply<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Stores an accumulator to the first 16 * MT rows of the tile at `tile`, which has 8 * NT elements of 16 bits per row.
template <class T, int MT, int NT>
__device__ __forceinline__ void store_tile(uint32_t tile, const float (&acc)[MT][NT][4]) {
  const int own = opaque_lane();
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store_shared(tile + Tile<T, 8 * NT>::at(16 * m + own / 4 + 8 * half, n) + own % 4 * 4,
                          pack<T>(acc[m][n][2 * half], acc[m][n][2 * half + 1]));
}

// acc += left^T @ right over R rows of two tiles of 16-bit elements. The left tile has rows of L elements, of which 16
// columns from chunk `row` on count; the right tile has rows of D, of which 8 * NT columns from chunk `column` on
// count.
template <class T, int L, int D, int R, int NT>
__device__ __forceinline__ void multiply_transposed(float (&acc)[1][NT][4], uint32_t left, int row, uint32_t right,
                                                    int column) {
  const int own = opaque_lane();
  const typename Tile<T, L>::Cursor lefts(left, own % 8 + own / 16 * 8, row + own / 8 % 2);
  const typename Tile<T, D>::Cursor rights(right, own % 16, column + own / 16);
#pragma unroll
  for (int step = 0; step < R / 16; ++step) {
    LeftOperand<T> a;
    ptx::ldmatrix_transposed(a.high, lefts.at(16 * step, 0));
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_transposed(b, rights.at(16 * step, n));
      multiply<T>(acc[0][n], a, b[0], b[1]);
      multiply<T>(acc[0][n + 1], a, b[2], b[3]);
    }
  }
}

}  // namespace torchweld::cuda::attention::sm80
