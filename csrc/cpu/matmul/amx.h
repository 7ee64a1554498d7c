// Blocks of a matrix product on Intel's AMX tiles: eight registers of 16 rows x 16 words. One instruction multiplies 16
// x 32 by 32 x 16 bf16 into 16 x 16 float32, eight times the rate of the vector units. Memory is then the limit. So
// operands consist of blocks of the size of a tile, one after the other (tile_layout.h), which the prefetchers follow.
// Intel: Architecture Instruction Set Extensions Programming Reference, chapter 3.
#pragma once

#include "cpu/matmul/operands.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kRowBytes = TileLayout<1>::side * 4;

// While it lives, all tiles of the thread are 16 x 16 words. The destructor restores the configuration of another
// library, which may configure tiles only once per thread.
class TileScope {
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };

 public:
  TileScope() {
    _tile_storeconfig(&before_);
    Config ours{};
    ours.palette = 1;
    for (int t = 0; t < 8; ++t) {
      ours.row_bytes[t] = kRowBytes;
      ours.rows[t] = TileLayout<1>::side;
    }
    _tile_loadconfig(&ours);
  }
  ~TileScope() {
    if (before_.palette != 0)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  TileScope(const TileScope&) = delete;

 private:
  Config before_;
};

// The compiler does not know which memory tile loads read. Stores must stay before them.
TW_INLINE void fence() { asm volatile("" ::: "memory"); }

// C[16, 16 N] = A[16, steps] B[steps, 16 N]. b_panel: from one column of blocks of B to the next.
template <int N>
TW_INLINE void tile_row(int64_t steps, const float* a, const float* b, int64_t b_panel, float* c, int64_t ldc) {
  fence();
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
  using Layout = TileLayout<1>;
  for (int64_t k = 0; k < steps; k += Layout::side, a += Layout::block, b += Layout::block) {
    _tile_loadd(4, a, kRowBytes);
    _tile_loadd(5, b, kRowBytes);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, b + b_panel, kRowBytes);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, b + 2 * b_panel, kRowBytes);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, b + 3 * b_panel, kRowBytes);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (N > 1) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (N > 2) _tile_stored(2, c + 32, ldc * 4);
  if constexpr (N > 3) _tile_stored(3, c + 48, ldc * 4);
  fence();
}

template <int M>
TW_INLINE void load_left(const float* a, int64_t a_rows) {
  _tile_loadd(4, a, kRowBytes);
  if constexpr (M > 1) _tile_loadd(5, a + a_rows, kRowBytes);
}

template <int N>
TW_INLINE void load_right(const float* b, int64_t b_panel) {
  _tile_loadd(6, b, kRowBytes);
  if constexpr (N > 1) _tile_loadd(7, b + b_panel, kRowBytes);
}

template <int M, int N>
TW_INLINE void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (N > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (M > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
}

// C[16 M, 16 N] (+)= A[16 M, steps] B[steps, 16 N]. a_rows: from one row of blocks of A to the next. Products of parts
// that are below the rounding of the first product are left out.
template <int kParts, int M, int N, bool kAccumulate, class Between>
TW_INLINE void tile_block(int64_t steps, const float* a, int64_t a_rows, const float* b, int64_t b_panel, float* c,
                          int64_t ldc, Between& between) {
  fence();
  if constexpr (kAccumulate) {
    _tile_loadd(0, c, ldc * 4);
    if constexpr (N > 1) _tile_loadd(1, c + 16, ldc * 4);
    if constexpr (M > 1) _tile_loadd(2, c + 16 * ldc, ldc * 4);
    if constexpr (M > 1 && N > 1) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    if constexpr (N > 1) _tile_zero(1);
    if constexpr (M > 1) _tile_zero(2);
    if constexpr (M > 1 && N > 1) _tile_zero(3);
  }
  using Layout = TileLayout<kParts>;
  for (int64_t k = 0; k < steps; k += Layout::side * kParts, a += Layout::range, b += Layout::range) {
    // Each line loads one new operand: third by first, second by first, second by second, first by second and so on.
    auto multiply = [&]() __attribute__((always_inline)) {
      multiply_tiles<M, N>();
      between();
    };
    if constexpr (kParts == 3) load_left<M>(a + 2 * Layout::block, a_rows), load_right<N>(b, b_panel), multiply();
    if constexpr (kParts == 3) load_left<M>(a + Layout::block, a_rows), multiply();
    if constexpr (kParts == 2) load_left<M>(a + Layout::block, a_rows), load_right<N>(b, b_panel), multiply();
    if constexpr (kParts >= 2) load_right<N>(b + Layout::block, b_panel), multiply();
    if constexpr (kParts >= 2) load_left<M>(a, a_rows), multiply();
    if constexpr (kParts == 3) load_right<N>(b + 2 * Layout::block, b_panel), multiply();
    if constexpr (kParts == 1) load_left<M>(a, a_rows);
    load_right<N>(b, b_panel), multiply();
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (N > 1) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (M > 1) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  fence();
}

// A block of at most 32 x 32.
template <int kParts, bool kAccumulate, class Between>
TW_INLINE void tile_square(int64_t rows, int64_t columns, int64_t steps, const float* a, int64_t a_rows, const float* b,
                           int64_t b_panel, float* c, int64_t ldc, Between&& between) {
  const bool tall = rows > 16, wide = columns > 16;
  if (tall && wide)
    tile_block<kParts, 2, 2, kAccumulate>(steps, a, a_rows, b, b_panel, c, ldc, between);
  else if (tall)
    tile_block<kParts, 2, 1, kAccumulate>(steps, a, a_rows, b, b_panel, c, ldc, between);
  else if (wide)
    tile_block<kParts, 1, 2, kAccumulate>(steps, a, a_rows, b, b_panel, c, ldc, between);
  else
    tile_block<kParts, 1, 1, kAccumulate>(steps, a, a_rows, b, b_panel, c, ldc, between);
}

// gemm_store.
template <class Compute, class Between>
void tile_store(int64_t rows, int64_t steps, const Left& a, const Right& b, const Span* columns_of, float* c,
                int64_t ldc, Between&& between) {
  constexpr int64_t kSide = Compute::Layout::side, kRowsAtOnce = Compute::parts == 1 ? kSide : 2 * kSide;
  for (int64_t m = 0; m < rows; m += kRowsAtOnce) {
    const Span& columns = columns_of[m / Compute::block_rows];
    const float* left = a.data + m * a.row;
    int64_t n = columns.begin;
    if constexpr (Compute::parts == 1) {
      for (; n + 64 <= columns.end; n += 64)
        tile_row<4>(steps, left, b.data + Compute::Layout::strip(n, b.panel), b.panel, c + m * ldc + n, ldc);
      if (n < columns.end)
        tile_row<2>(steps, left, b.data + Compute::Layout::strip(n, b.panel), b.panel, c + m * ldc + n, ldc);
    } else {
      for (; n < columns.end; n += 32)
        tile_square<Compute::parts, false>(rows - m, 32, steps, left, kSide * a.row,
                                           b.data + Compute::Layout::strip(n, b.panel), b.panel, c + m * ldc + n, ldc,
                                           between);
    }
  }
}

// gemm_accumulate. kSteps steps at a time: a column of B's tiles stays in L1 for all rows.
template <class Compute>
void tile_accumulate(int64_t rows, int64_t columns, const Left& a, const Right& b, const Span* steps_of, float* c,
                     int64_t ldc) {
  using Layout = typename Compute::Layout;
  constexpr int64_t kUnit = Layout::side * Compute::parts, kSteps = 256 / kUnit * kUnit,
                    kBlockRows = Compute::block_rows;
  int64_t last = 0;
  for (int64_t m = 0; m < rows; m += kBlockRows) last = max_of(last, steps_of[m / kBlockRows].end);
  for (int64_t k = 0; k < last; k += kSteps)
    for (int64_t n = 0; n < columns; n += 32) {
      const float* right = b.data + Compute::Layout::strip(n, b.panel);
      for (int64_t m = 0; m < rows; m += kBlockRows) {
        const int64_t begin = max_of(steps_of[m / kBlockRows].begin, k),
                      end = min_of(steps_of[m / kBlockRows].end, k + kSteps);
        if (begin < end)
          tile_square<Compute::parts, true>(rows - m, columns - n, end - begin,
                                            a.data + m * a.row + Layout::at_step(begin), Layout::side * a.row,
                                            right + Layout::at_step(begin), b.panel, c + m * ldc + n, ldc, Nothing{});
      }
    }
}

}  // namespace
}  // namespace torchweld::cpu
