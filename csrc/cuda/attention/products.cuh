// Products of tiles by tensor cores.
//
// They are accumulated as mma leaves them: acc[m][n][e] of lane 4 * g + t is row 16 * m + g (+ 8 if e > 1), column
// 8 * n + 2 * t (+ 1 if e is odd).
//
// A step of a product takes 32 bytes of a row: 16 elements of 16 bits, or 8 floats. Floats go through TF32 as two
// numbers each, high + low, and three products (low * low is below fp32's own rounding). Tensor cores round sums
// towards zero, errors that add up: with floats they sum one step from zero, and steps are added outside of them.
// (Ootomo, Yokota: Recovering single precision accuracy from Tensor Cores, arXiv:2203.03341.)
#pragma once

#include "cuda/attention/tile.cuh"

namespace torchweld::cuda {

// The left operand of one step: 16 rows by 32 bytes, as mma takes it. low: floats only.
template <class T>
struct Left {
  static constexpr bool kSplit = sizeof(T) == 4;
  uint32_t high[4], low[kSplit ? 4 : 1];

  // `address`: that of chunk lane / 16 of row lane % 16.
  __device__ __forceinline__ void load(uint32_t address) {
    ptx::ldmatrix(high, address);
    if constexpr (kSplit) split();
  }

  // Of an accumulator: its next two tiles of 8 columns are 16 columns of 16 bits, the next one is 8 floats. Of those
  // column 2t takes the place of t, and 2t + 1 that of t + 4; `multiply_columns` orders the right operand likewise.
  __device__ __forceinline__ void take(const float (*c)[4]) {
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

// kTransposed: the sums are those of the product of the right rows with the left ones, to the last bit.
template <class T, bool kTransposed = false>
__device__ __forceinline__ void multiply(float (&c)[4], const Left<T>& a, uint32_t b0, uint32_t b1) {
  if constexpr (Left<T>::kSplit) {
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

// acc = left @ right^T: the products of 16 * MT rows of the tile at `left` with 8 * NT rows of the tile at `right`.
template <class T, int D, bool kTransposed = false, int MT, int NT>
__device__ __forceinline__ void multiply_rows(float (&acc)[MT][NT][4], uint32_t left, uint32_t right) {
  static_assert(NT % 2 == 0);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = 0.0f;
  const int own = lane_anew();
  const typename Tile<T, D>::Cursor lefts(left, own % 16, own / 16);
  const typename Tile<T, D>::Cursor rights(right, own % 16, own / 16);
  constexpr int kUnroll = Left<T>::kSplit ? 1 : Tile<T, D>::kSteps;  // sums of many steps would not fit the registers
#pragma unroll kUnroll
  for (int step = 0; step < Tile<T, D>::kSteps; ++step) {
    Left<T> a[MT];
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

// acc += weights @ tile: weights, 16 * MT by 8 * NT, as an accumulator; the tile's first 8 * NT rows, of which columns
// from `size` on are zeros. With floats it stops there, and has fewer columns in registers at once.
template <class T, int D, int MT, int NT>
__device__ __forceinline__ void multiply_columns(float (&acc)[MT][D / 8][4], const float (&weights)[MT][NT][4],
                                                 uint32_t tile, int size) {
  constexpr int kTiles = Left<T>::kSplit ? 1 : 2;  // of 8 columns, that one step takes
  static_assert(NT % kTiles == 0);
  const int own = lane_anew();
  const typename Tile<T, D>::Cursor even = Left<T>::kSplit
                                               ? typename Tile<T, D>::Cursor(tile, lane_column(), lane_row() / 4)
                                               : typename Tile<T, D>::Cursor(tile, own % 16, own / 16);
  const typename Tile<T, D>::Cursor odd(tile, lane_column() + 1, lane_row() / 4);  // floats only
#pragma unroll
  for (int step = 0; step < NT / kTiles; ++step) {
    Left<T> a[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) a[m].take(weights[m] + step * kTiles);
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      if (Left<T>::kSplit && n % 4 == 0 && 8 * n >= size) break;
      uint32_t b[4];
      if constexpr (Left<T>::kSplit) {
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

// An accumulator to the first 16 * MT rows of the tile at `tile`, of 8 * NT elements of 16 bits.
template <class T, int MT, int NT>
__device__ __forceinline__ void store_tile(uint32_t tile, const float (&acc)[MT][NT][4]) {
  const int own = lane_anew();
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store_shared(tile + Tile<T, 8 * NT>::at(16 * m + own / 4 + 8 * half, n) + own % 4 * 4,
                          pack<T>(acc[m][n][2 * half], acc[m][n][2 * half + 1]));
}

// acc += left^T @ right, over R rows of two tiles: 16 columns of the left one, of L, from chunk `row` on, and 8 * NT of
// the right one, of D, from chunk `column` on. Elements of 16 bits.
template <class T, int L, int D, int R, int NT>
__device__ __forceinline__ void multiply_transposed(float (&acc)[1][NT][4], uint32_t left, int row, uint32_t right,
                                                    int column) {
  const int own = lane_anew();
  const typename Tile<T, L>::Cursor lefts(left, own % 8 + own / 16 * 8, row + own / 8 % 2);
  const typename Tile<T, D>::Cursor rights(right, own % 16, column + own / 16);
#pragma unroll
  for (int step = 0; step < R / 16; ++step) {
    Left<T> a;
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

}  // namespace torchweld::cuda
