// The matrix products inside attention and linear_cross_entropy: C[m, n] (+)= sum over k of A[m, k] * B[k, n], by
// vectors or by AMX tiles as the format of the operands says.
#pragma once

#include "cpu/matmul/vectors.h"
#if defined(__AMX_BF16__)
  #include "cpu/matmul/amx.h"
#endif

namespace torchweld::cpu {
namespace {

#if !defined(__AMX_BF16__)
struct TileScope {
  TileScope() {}  // there are no tiles to be set up
};
#endif

// C = A B. columns_of[m / block_rows]: the columns of a block of rows that are computed, multiples of column_unit.
template <class Compute, class Between = Nothing>
void gemm_store(int64_t rows, int64_t steps, const Left& a, const Right& b, const Span* columns_of, float* c,
                int64_t ldc, [[maybe_unused]] Between&& between = {}) {
#if defined(__AMX_BF16__)
  if constexpr (Compute::tiles) return tile_store<Compute>(rows, steps, a, b, columns_of, c, ldc, between);
#endif
  int64_t last = 0;
  for (int64_t m = 0; m < rows; m += kRows) last = max_of(last, columns_of[m / kRows].end);
  // A panel of B stays in L1 for all rows.
  for (int64_t n = 0; n < last; n += kPanel)
    for (int64_t m = 0; m < rows; m += kRows) {
      const Span& wanted = columns_of[m / kRows];
      const int64_t begin = max_of(n, wanted.begin), end = min_of(n + kPanel, wanted.end);
      if (begin < end)
        multiply_vectors<Compute, false>((end - begin) / W, min_of(kRows, rows - m), {0, steps}, rows_from(a, m),
                                         b.data + n / kPanel * b.panel + (begin - n), b.step, c + m * ldc + begin, ldc);
    }
}

// C += A B over `columns`, a multiple of W. steps_of[m / block_rows]: the steps of k that count for a block of rows.
template <class Compute>
void gemm_accumulate(int64_t rows, int64_t columns, const Left& a, const Right& b, const Span* steps_of, float* c,
                     int64_t ldc) {
#if defined(__AMX_BF16__)
  if constexpr (Compute::tiles) return tile_accumulate<Compute>(rows, columns, a, b, steps_of, c, ldc);
#endif
  for (int64_t n = 0; n < columns; n += kPanel)
    for (int64_t m = 0; m < rows; m += kRows)
      multiply_vectors<Compute, true>(min_of(kPanel, columns - n) / W, min_of(kRows, rows - m), steps_of[m / kRows],
                                      rows_from(a, m), b.data + n / kPanel * b.panel, b.step, c + m * ldc + n, ldc);
}

}  // namespace
}  // namespace torchweld::cpu
