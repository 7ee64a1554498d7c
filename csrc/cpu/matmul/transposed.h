// The right operand of query @ key^T: the transpose of rows of elements, packed in panels, or read where the rows lie.
//
// Packing costs as much as the products of several rows. For fewer rows than that, each product is a sum of vectors
// along the rows, and the lanes of W sums are added together.
#pragma once

#include "cpu/matmul/pack.h"

namespace torchweld::cpu {
namespace {

// Whether products of `rows` rows had better read rows of `dim` elements where they lie: 2 W adds of lanes per row
// stand against a transpose.
template <class T, class Compute>
TW_INLINE bool transposed_in_place(int64_t rows, int64_t stride, int64_t dim) {
  return !Compute::tiles && kNative<T, Compute> && dim % (W * Compute::per_word) == 0 &&
         stride % Compute::per_word == 0 && rows <= min_of(dim / (2 * W * Compute::per_word), 4);
}

// B[k, n] is word k of row n.
template <class Compute>
struct Transposed {
  Right panels;        // where there are no rows
  const float* rows;   // row n at rows + n * row; nullptr: packed
  int64_t row, count;  // so many rows may be read; zeros stand for those that follow

  // Of rows of `steps` words, as pack_transposed leaves them.
  TW_INLINE static Transposed packed(const float* data, int64_t steps) {
    return {{data, Compute::panel, Compute::panel * steps}, nullptr, 0, 0};
  }
  // Of rows of elements that are words, `stride` elements apart.
  template <class T>
  TW_INLINE static Transposed in_place(const T* data, int64_t stride, int64_t count) {
    return {{}, reinterpret_cast<const float*>(data), stride / Compute::per_word, count};
  }

  // From column n on, a multiple of kPanel.
  TW_INLINE Transposed from(int64_t n, int64_t steps) const {
    if (rows != nullptr) return {panels, rows + n * row, row, count - n};
    return {{panels.data + n * steps, panels.step, panels.panel}, nullptr, 0, 0};
  }

  // As gemm_store.
  template <class Between = Nothing>
  TW_INLINE void multiply(int64_t m, int64_t steps, const Left& a, const Span* columns_of, float* c, int64_t ldc,
                          Between&& between = {}) const {
    if constexpr (!Compute::tiles)
      if (rows != nullptr) return multiply_rows(m, steps, a, columns_of, c, ldc);
    gemm_store<Compute>(m, steps, a, panels, columns_of, c, ldc, between);
  }

 private:
  __attribute__((noinline)) void multiply_rows(int64_t m, int64_t steps, const Left& a, const Span* columns_of,
                                               float* c, int64_t ldc) const {
    for (int64_t r = 0; r < m; ++r) {
      const Span& columns = columns_of[r / Compute::block_rows];
      for (int64_t n = columns.begin; n < columns.end; n += W) {
        Vec sums[W] = {};
        const int64_t here = min_of(W, count - n);
        for (int64_t i = 0; i < here; ++i) {
          const float* of = rows + (n + i) * row;
          for (int64_t k = 0; k < steps; k += W)
            sums[i] = Compute::dot(load(of + k), load(a.data + r * a.row + k), sums[i]);
        }
        store(c + r * ldc + n, reduce(sums, [](Vec x, Vec y) { return x + y; }));
      }
    }
  }
};

}  // namespace
}  // namespace torchweld::cpu
