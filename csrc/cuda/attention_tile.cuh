// Tiles of rows in shared memory, and their products by tensor cores.
//
// A tile is R rows of D elements (the head size, padded with zeros), in chunks of 16 bytes; chunk c of row r lies at
// place c ^ (r % 8), so that the eight rows that an ldmatrix reads at once are in different banks. Products are
// accumulated as mma leaves them: acc[m][n][e] of lane 4 * g + t is row 16 * m + g (+ 8 if e > 1), column 8 * n + 2 * t
// (+ 1 if e is odd).
//
// A step of a product takes 32 bytes of a row: 16 elements of 16 bits, or 8 floats. Floats go through TF32 as two
// numbers each, high + low, and three products (low * low is below fp32's own rounding). Tensor cores round sums
// towards zero, errors that add up: with floats they sum one step from zero, and steps are added outside of them.
// (Ootomo, Yokota: Recovering single precision accuracy from Tensor Cores, arXiv:2203.03341.)
#pragma once

#include "cuda/attention_instances.h"
#include "cuda/ptx.cuh"

namespace torchweld::cuda {

constexpr int kLanes = 32;

// Whether a kernel of this type and head size is being compiled for Hopper, which has one of its own: it stays empty.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class T, int D>
constexpr bool kOnHopper = kHasSm90<T, D>;
#else
template <class T, int D>
constexpr bool kOnHopper = false;
#endif

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kLanes; }
__device__ __forceinline__ int lane_row() { return lane() / 4; }         // g
__device__ __forceinline__ int lane_column() { return lane() % 4 * 2; }  // 2t

// The lane, but the compiler cannot know that it always is: what follows from it is worked out where it is needed, not
// kept in registers that the accumulators need.
__device__ __forceinline__ int lane_anew() { return ptx::opaque(lane()); }

__device__ __forceinline__ int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// ---- In shared memory

template <class T, int D>
struct Tile {
  static constexpr int kRowBytes = D * static_cast<int>(sizeof(T));
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements
  static constexpr int kChunks = D / kChunk;                       // per row
  static constexpr int kSteps = D * static_cast<int>(sizeof(T)) / 32;
  static constexpr int kTurns = kChunks < 8 ? kChunks : 8;
  static_assert(kChunks >= 2, "a row is at least 32 bytes");

  // Offset of a chunk of the tile.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    const int turn = row / (8 / kTurns) % kTurns;  // shorter rows share the banks
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ turn) << 4));
  }

  // What a lane reads in a loop: a row within 16 and chunk 0 or 1, moved by constants: whole groups of 8 rows, and an
  // even number of chunks. Splitting the sum this way leaves the loop one xor in each of four steps.
  struct Cursor {
    uint32_t row, chunk;

    __device__ __forceinline__ Cursor(uint32_t base, int row, int chunk)
        : row(base + static_cast<uint32_t>(row * kRowBytes)),
          chunk(Tile::at(row, chunk) - static_cast<uint32_t>(row * kRowBytes)) {}

    __device__ __forceinline__ uint32_t at(int rows, int chunks) const {
      constexpr int kMask = kTurns - 1;
      return row + (chunk ^ static_cast<uint32_t>((chunks & kMask) << 4)) +
             static_cast<uint32_t>(rows * kRowBytes + ((chunks & ~kMask) << 4));
    }
  };
};

// Where the rows of one head lie: row i at base + i * stride; of those only [begin, end) may be read, and `size`
// elements.
template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  int begin, end, size;
  bool packets;  // every row begins on 16 bytes

  // Row i, then every `step`-th after it.
  struct Walk {
    const T* row;
    int64_t ahead;

    __device__ __forceinline__ const T* here() const { return row; }
    __device__ __forceinline__ void next() { row += ahead; }
  };
  __device__ __forceinline__ Walk walk(int i, int step) const {
    return {base + i * stride, ptx::opaque(step * stride)};
  }
};

// A chunk to the address `to`: `elements` from `from` on, zeros after them. The copy belongs to the group that the
// caller ends; where `from` is not on 16 bytes (`packets`) it goes element by element, at once.
template <class T>
__device__ __forceinline__ void load_chunk(uint32_t to, const T* from, int elements, bool packets) {
  if (packets) return ptx::cp_async<16>(to, from, elements * static_cast<int>(sizeof(T)));
#pragma unroll 1
  for (int e = 0; e < 16 / static_cast<int>(sizeof(T)); ++e) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    ptx::store_shared(to + e * sizeof(T), e < elements ? __ldg(reinterpret_cast<const Bits*>(from + e)) : Bits{0});
  }
}

// Rows [first, first + R) into the tile at `tile`, zeros for what may not be read; the first kThreads threads share the
// work. Tiles of which nothing is missing, most of all, cost a few instructions per chunk.
template <class T, int D, int R, int kThreads, class Layout = Tile<T, D>, class Source = Rows<T>>
__device__ __forceinline__ void load_tile(uint32_t tile, const Source& rows, int first) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kChunks = D / kChunk, kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRowsAtOnce > 0);
  const int thread = ptx::opaque(static_cast<int>(threadIdx.x)), chunk = thread % kChunks, row0 = thread / kChunks;
  auto walk = rows.walk(first + row0, kRowsAtOnce);
  auto is_here = [&](int r) { return R % kRowsAtOnce == 0 || row0 + r < R; };
  // Groups of 8 rows lie alike.
  auto place = [&](int r) { return tile + Layout::at(row0 + r % 8, chunk) + Layout::at(r / 8 * 8, 0); };
  if (rows.packets && rows.size == D && first >= rows.begin && first + R <= rows.end) {
#pragma unroll
    for (int r = 0; r < R; r += kRowsAtOnce, walk.next())
      if (is_here(r)) ptx::cp_async(place(r), walk.here() + chunk * kChunk);
    return;
  }
  const int here = clamp(rows.size - chunk * kChunk, 0, kChunk);
#pragma unroll 1
  for (int r = 0; r < R; r += kRowsAtOnce, walk.next()) {
    if (!is_here(r)) break;
    const bool exists = here > 0 && first + row0 + r >= rows.begin && first + row0 + r < rows.end;
    load_chunk(place(r), exists ? walk.here() + chunk * kChunk : rows.base, exists ? here : 0, rows.packets);
  }
}

// ---- Products

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

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const Left<T>& a, uint32_t b0, uint32_t b1) {
  if constexpr (Left<T>::kSplit) {
    const float v0 = __uint_as_float(b0), v1 = __uint_as_float(b1);
    const uint32_t high0 = ptx::to_tf32(v0), high1 = ptx::to_tf32(v1);
    float sum[4] = {};
    ptx::mma_tf32(sum, a.low, high0, high1);
    ptx::mma_tf32(sum, a.high, ptx::to_tf32(v0 - __uint_as_float(high0)), ptx::to_tf32(v1 - __uint_as_float(high1)));
    ptx::mma_tf32(sum, a.high, high0, high1);
#pragma unroll
    for (int e = 0; e < 4; ++e) c[e] += sum[e];
  } else {
    ptx::mma<T>(c, a.high, b0, b1);
  }
}

// acc = left @ right^T: the products of 16 * MT rows of the tile at `left` with 8 * NT rows of the tile at `right`.
template <class T, int D, int MT, int NT>
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
        multiply<T>(acc[m][n], a[m], b[0], b[2]);
        multiply<T>(acc[m][n + 1], a[m], b[1], b[3]);
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

// ---- To global memory

template <class T>
__device__ __forceinline__ void store_one(T* to, float value) {
  Run<T, 1> one;
  one.set([&](int) { return value; });
  one.store(to);
}

// An accumulator times `factor(m, half)` to rows of T: row 16 * m + g + 8 * half of it to `row(m, half)`, nullptr:
// none.
template <class T, int MT, int NT, class Row, class Factor>
__device__ __forceinline__ void store_rows(const float (&acc)[MT][NT][4], int size, bool pairs, Row&& row,
                                           Factor&& factor) {
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* to = row(m, half);
      if (to == nullptr) continue;
      const float f = factor(m, half);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int column = n * 8 + lane_column();
        const float x = acc[m][n][2 * half] * f, y = acc[m][n][2 * half + 1] * f;
        if (pairs && column + 1 < size) {
          if constexpr (sizeof(T) == 4)
            *reinterpret_cast<float2*>(to + column) = make_float2(x, y);
          else
            *reinterpret_cast<uint32_t*>(to + column) = pack<T>(x, y);
        } else {
          if (column < size) store_one(to + column, x);
          if (column + 1 < size) store_one(to + column + 1, y);
        }
      }
    }
}

}  // namespace torchweld::cuda
