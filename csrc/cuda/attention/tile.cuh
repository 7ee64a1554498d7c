// Tiles of rows in shared memory: their layout, how they are loaded, and how accumulators go back to global memory.
//
// A tile is R rows of D elements (the head size, padded with zeros) in chunks of 16 bytes. Chunk c of row r is at place
// c ^ (r % 8), so the eight rows that one ldmatrix reads lie in different banks.
#pragma once

#include "cuda/ptx.cuh"

namespace torchweld::cuda::attention {

// Unsigned inside: the compiler divides what may be negative in more steps. (warp() so spills in paged decoding.)
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % unsigned{kWarpSize}); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarpSize; }
__device__ __forceinline__ int lane_row() { return lane() / 4; }         // g
__device__ __forceinline__ int lane_column() { return lane() % 4 * 2; }  // 2t

// The lane, hidden from the compiler. What follows from it is computed where it is used, and does not occupy registers
// that the accumulators need.
__device__ __forceinline__ int opaque_lane() { return ptx::opaque(lane()); }

__device__ __forceinline__ int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// ---- In shared memory

template <class T, int D>
struct Tile {
  static constexpr int kRowBytes = D * static_cast<int>(sizeof(T));
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));  // elements
  static constexpr int kChunks = D / kChunk;                       // per row
  static constexpr int kSteps = D * static_cast<int>(sizeof(T)) / 32;
  static constexpr int kSwizzle = kChunks < 8 ? kChunks : 8;
  static_assert(kChunks >= 2, "a row is at least 32 bytes");

  // Offset of a chunk of the tile.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    const int swizzle = row / (8 / kSwizzle) % kSwizzle;  // shorter rows share the banks
    return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ swizzle) << 4));
  }

  // The place that a lane reads in a loop: a row below 16 and chunk 0 or 1, moved by a multiple of 8 rows and an even
  // number of chunks. With the sum split in this way the loop needs one xor in four steps.
  struct Cursor {
    uint32_t row, chunk;

    __device__ __forceinline__ Cursor(uint32_t base, int row, int chunk)
        : row(base + static_cast<uint32_t>(row * kRowBytes)),
          chunk(Tile::at(row, chunk) - static_cast<uint32_t>(row * kRowBytes)) {}

    __device__ __forceinline__ uint32_t at(int rows, int chunks) const {
      constexpr int kMask = kSwizzle - 1;
      return row + (chunk ^ static_cast<uint32_t>((chunks & kMask) << 4)) +
             static_cast<uint32_t>(rows * kRowBytes + ((chunks & ~kMask) << 4));
    }
  };
};

// The rows of one head: row i is at base + i * stride. Only rows [begin, end) and `size` elements of each may be read.
template <class T>
struct Rows {
  const T* base;
  int64_t stride;
  int begin, end, size;
  bool vectorized;  // every row begins on 16 bytes

  // Row i, then every `step`-th row after it.
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

// Copies a chunk to the address `to`: `elements` elements, then zeros. The copy joins the cp.async group that the
// caller commits. Without alignment to 16 bytes (`vectorized`) it copies element by element, at once.
template <class T>
__device__ __forceinline__ void load_chunk(uint32_t to, const T* from, int elements, bool vectorized) {
  if (vectorized) return ptx::cp_async<16>(to, from, elements * static_cast<int>(sizeof(T)));
#pragma unroll 1
  for (int e = 0; e < 16 / static_cast<int>(sizeof(T)); ++e) {
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    ptx::store_shared(to + e * sizeof(T), e < elements ? __ldg(reinterpret_cast<const Bits*>(from + e)) : Bits{0});
  }
}

// What one of kThreads threads that load tiles of R rows copies: chunk `chunk` of row `row` and of every kRowsAtOnce-th
// row after it.
template <class T, int D, int R, int kThreads>
struct TileShare {
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T)), kChunks = D / kChunk,
                       kRowsAtOnce = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRowsAtOnce > 0);
  int chunk, row;

  // Of an unsigned number it takes fewer instructions; of a signed one the backward of sm_80 takes fewer registers.
  template <class Number>
  __device__ __forceinline__ explicit TileShare(Number thread)
      : chunk(static_cast<int>(thread % Number{kChunks})), row(static_cast<int>(thread / Number{kChunks})) {}
  __device__ __forceinline__ int column() const { return chunk * kChunk; }
  __device__ __forceinline__ bool has(int r) const { return R % kRowsAtOnce == 0 || row + r < R; }
  // Groups of 8 rows have the same layout.
  template <class Layout>
  __device__ __forceinline__ uint32_t place(int r) const {
    return Layout::at(row + r % 8, chunk) + Layout::at(r / 8 * 8, 0);
  }
};

// Loads rows [first, first + R) into the tile at `tile`, with zeros for what may not be read. kThreads threads share
// the work. `walk` stands `column` elements before the first chunk of this one.
template <class T, class Layout, class Source, class Walk, int D, int R, int kThreads>
__device__ __forceinline__ void load_partial_tile(uint32_t tile, const Source& rows, int first, Walk& walk, int column,
                                                  const TileShare<T, D, R, kThreads>& own) {
  using Share = TileShare<T, D, R, kThreads>;
  const int here = clamp(rows.size - own.column(), 0, Share::kChunk);
#pragma unroll 1
  for (int r = 0; r < R; r += Share::kRowsAtOnce, walk.next()) {
    if (!own.has(r)) break;
    const bool exists = here > 0 && first + own.row + r >= rows.begin && first + own.row + r < rows.end;
    load_chunk(tile + own.template place<Layout>(r), exists ? walk.here() + column : rows.base, exists ? here : 0,
               rows.vectorized);
  }
}

// The same. A tile without missing parts, the usual case, costs a few instructions per chunk.
template <class T, int D, int R, int kThreads, class Layout = Tile<T, D>, class Source = Rows<T>>
__device__ __forceinline__ void load_tile(uint32_t tile, const Source& rows, int first) {
  using Share = TileShare<T, D, R, kThreads>;
  const Share own(ptx::opaque(static_cast<int>(threadIdx.x)));
  auto walk = rows.walk(first + own.row, Share::kRowsAtOnce);
  if (!(rows.vectorized && rows.size == D && first >= rows.begin && first + R <= rows.end))
    return load_partial_tile<T, Layout>(tile, rows, first, walk, own.column(), own);
#pragma unroll
  for (int r = 0; r < R; r += Share::kRowsAtOnce, walk.next())
    if (own.has(r)) ptx::cp_async(tile + own.template place<Layout>(r), walk.here() + own.column());
}

// ---- To global memory

template <class T>
__device__ __forceinline__ void store_one(T* to, float value) {
  Vector<T, 1> one;
  one.set([&](int) { return value; });
  one.store(to);
}

// Stores an accumulator times factor(m, half) to rows of T: row 16 * m + g + 8 * half goes to row(m, half), unless
// that is nullptr.
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

}  // namespace torchweld::cuda::attention
