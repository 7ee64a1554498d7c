// The products of gemm.h on Intel's AMX tiles: eight registers of 16 rows x 16 words. One instruction multiplies 16 x 32
// by 32 x 16 bf16 into 16 x 16 float32, eight times what the vector units do in the same cycles. A left tile is 16 rows of
// 16 neighbouring words, a right tile 16 steps of 16 columns: the operands of gemm.h as they lie.
// Intel: Architecture Instruction Set Extensions Programming Reference, chapter 3.
#pragma once

#include "cpu/gemm.h"

namespace torchweld::cpu {
namespace {

// While it lives, the thread's tiles are all 16 x 16 words. What another library had set up is put back: some do so once
// per thread and rely on it.
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
      ours.row_bytes[t] = 64;
      ours.rows[t] = 16;
    }
    _tile_loadconfig(&ours);
  }
  ~TileScope() {
    if (before_.palette != 0) _tile_loadconfig(&before_);
    else _tile_release();
  }
  TileScope(const TileScope&) = delete;

 private:
  Config before_;
};

// The compiler does not know what tile loads read: stores before them must not sink below.
TW_INLINE void fence() { asm volatile("" ::: "memory"); }

// C[16, 16 N] = A[16, steps] B[steps, 16 N]. Each load of B is used once, each of A N times.
template <int N>
TW_INLINE void tile_row(int64_t steps, const float* a, int64_t a_row, const float* b, int64_t b_step, float* c, int64_t ldc) {
  fence();
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
  for (int64_t k = 0; k < steps; k += 16, b += 16 * b_step) {
    _tile_loadd(4, a + k, a_row * 4);
    _tile_loadd(5, b, b_step * 4);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, b + 16, b_step * 4);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, b + 32, b_step * 4);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, b + 48, b_step * 4);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (N > 1) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (N > 2) _tile_stored(2, c + 32, ldc * 4);
  if constexpr (N > 3) _tile_stored(3, c + 48, ldc * 4);
  fence();
}

// C[16 M, 16 N] += A[16 M, steps] B[steps, 16 N].
template <int M, int N>
TW_INLINE void tile_block(int64_t steps, const float* a, int64_t a_row, const float* b, int64_t b_step, float* c, int64_t ldc) {
  fence();
  _tile_loadd(0, c, ldc * 4);
  if constexpr (N > 1) _tile_loadd(1, c + 16, ldc * 4);
  if constexpr (M > 1) _tile_loadd(2, c + 16 * ldc, ldc * 4);
  if constexpr (M > 1 && N > 1) _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  for (int64_t k = 0; k < steps; k += 16, b += 16 * b_step) {
    _tile_loadd(4, a + k, a_row * 4);
    _tile_loadd(6, b, b_step * 4);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, b + 16, b_step * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
      _tile_loadd(5, a + 16 * a_row + k, a_row * 4);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  if constexpr (N > 1) _tile_stored(1, c + 16, ldc * 4);
  if constexpr (M > 1) _tile_stored(2, c + 16 * ldc, ldc * 4);
  if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
  fence();
}

// gemm_store. A row of tiles of A stays in L1 for all panels of B.
void tile_store(int64_t rows, int64_t steps, const Left& a, const Right& b, const Span* columns_of, float* c, int64_t ldc) {
  for (int64_t m = 0; m < rows; m += 16) {
    const Span& columns = columns_of[m / Bf16Tiles::block_rows];
    for (int64_t n = columns.begin; n < columns.end;) {
      const int64_t end = min_of(round_down(n, kPanel) + kPanel, columns.end);
      const float* right = b.data + n / kPanel * b.panel + n % kPanel;
      if (end - n == kPanel) tile_row<4>(steps, a.data + m * a.row, a.row, right, b.step, c + m * ldc + n, ldc);
      else tile_row<2>(steps, a.data + m * a.row, a.row, right, b.step, c + m * ldc + n, ldc);
      n = end;
    }
  }
}

// gemm_accumulate. So many steps at a time that a column of B's tiles stays in L1 for all rows.
void tile_accumulate(int64_t rows, int64_t columns, const Left& a, const Right& b, const Span* steps_of, float* c, int64_t ldc) {
  constexpr int64_t kSteps = 128, kBlockRows = Bf16Tiles::block_rows;
  int64_t last = 0;
  for (int64_t m = 0; m < rows; m += kBlockRows) last = max_of(last, steps_of[m / kBlockRows].end);
  for (int64_t k = 0; k < last; k += kSteps)
    for (int64_t n = 0; n < columns; n += 32) {
      const float* right = b.data + n / kPanel * b.panel + n % kPanel;
      for (int64_t m = 0; m < rows; m += kBlockRows) {
        const int64_t begin = max_of(steps_of[m / kBlockRows].begin, k), end = min_of(steps_of[m / kBlockRows].end, k + kSteps);
        if (begin >= end) continue;
        const float *left = a.data + m * a.row + begin, *first = right + begin * b.step;
        float* out = c + m * ldc + n;
        const bool tall = rows - m > 16, wide = columns - n > 16;
        if (tall && wide) tile_block<2, 2>(end - begin, left, a.row, first, b.step, out, ldc);
        else if (tall) tile_block<2, 1>(end - begin, left, a.row, first, b.step, out, ldc);
        else if (wide) tile_block<1, 2>(end - begin, left, a.row, first, b.step, out, ldc);
        else tile_block<1, 1>(end - begin, left, a.row, first, b.step, out, ldc);
      }
    }
}

}  // namespace
}  // namespace torchweld::cpu
