// From rows of elements in memory, with any stride between them, to the operands of gemm.h. What is not there (a row
// past the end, the rest of a vector) becomes zero, so the products need no masks.
#pragma once

#include "cpu/gemm.h"

namespace torchweld::cpu {
namespace {

// Whether memory of T already is words of Compute.
template <class T, class Compute>
constexpr bool kNative = sizeof(T) * Compute::per_word == 4;

// W x W: row i becomes column i. Each round interleaves the two halves; after log2(W) rounds that is the transpose.
TW_INLINE void transpose(Vec (&v)[W]) {
  VecI low, high;
  for (int i = 0; i < W; ++i) {
    low[i] = i / 2 + (i % 2) * W;
    high[i] = low[i] + W / 2;
  }
  for (int round = 1; round < W; round *= 2) {
    Vec next[W];
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = __builtin_shuffle(v[i], v[i + W / 2], low);
      next[2 * i + 1] = __builtin_shuffle(v[i], v[i + W / 2], high);
    }
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
}

// Lane n of the result: all lanes of group[n] together, by an f of two vectors.
template <class F>
TW_INLINE Vec reduce(Vec (&group)[W], F&& f) {
  transpose(group);
  for (int half = W / 2; half > 0; half /= 2)
    for (int n = 0; n < half; ++n) group[n] = f(group[n], group[n + half]);
  return group[0];
}

// Words of a row of `dim` elements, padded as the products want it.
template <class Compute>
TW_INLINE int64_t words_of(int64_t dim) { return round_up(ceil_div(dim, Compute::per_word), Compute::step_unit); }

// Words [word, word + W) of a row of `dim` elements.
template <class T, class Compute>
TW_INLINE Vec load_words(const T* row, int64_t word, int64_t dim) {
  const int64_t first = word * Compute::per_word, left = dim - first;
  if (Compute::step_unit > 1 && left <= 0) return Vec{};
  if constexpr (Compute::per_word == 1) {
    return left >= W ? load(row + first) : load(row + first, First{static_cast<int>(left)});
  } else {
    if (left >= 2 * W) {
      Vec v;
      std::memcpy(&v, row + first, sizeof v);
      return v;
    }
#if defined(__AVX512BW__)
    return (Vec)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), row + first);
#else
    Vec v{};
    std::memcpy(&v, row + first, static_cast<uint64_t>(left) * sizeof(T));
    return v;
#endif
  }
}

// The transpose as a right operand: B[k, n] is word k of row n. Panels of that many rows, each [dim in words][panel].
template <class T, class Compute>
void pack_transposed(const T* source, int64_t stride, int64_t rows, int64_t dim, float* out) {
  const int64_t steps = words_of<Compute>(dim);
  for (int64_t n = 0; n < round_up(rows, Compute::column_unit); n += W) {
    constexpr int64_t kPanel = Compute::panel;
    float* panel = out + n / kPanel * steps * kPanel + n % kPanel;
    for (int64_t k = 0; k < steps; k += W) {
      Vec v[W];
      for (int i = 0; i < W; ++i) v[i] = n + i < rows ? load_words<T, Compute>(source + (n + i) * stride, k, dim) : Vec{};
      transpose(v);
      const int64_t count = min_of(W, steps - k);
      if (count == W) {
        for (int i = 0; i < W; ++i) store(panel + (k + i) * kPanel, v[i]);
      } else {
        for (int i = 0; i < count; ++i) store(panel + (k + i) * kPanel, v[i]);
      }
    }
  }
}

// As a right operand: B[k, n] is element n of row k, or of rows 2k and 2k + 1. Rows of round_up(dim, W) words; with tiles,
// columns of blocks that are `panel` words apart.
template <class T, class Compute>
void pack_rows(const T* source, int64_t stride, int64_t rows, int64_t dim, float* out, int64_t panel) {
  const int64_t width = round_up(dim, W), steps = words_of<Compute>(rows);
  auto at = [&](int64_t k, int64_t i) { return Compute::tiles ? out + i / 16 * panel + k * 16 + i % 16 : out + k * width + i; };
  for (int64_t k = 0; k < steps; ++k) {
    const T* row = source + k * Compute::per_word * stride;
    for_each_vector(dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      if constexpr (Compute::per_word == 1) {
        store(at(k, i), load(row + i, lanes));
      } else {
        const VecU even = 2 * k < rows ? __builtin_convertvector(load_bits(row + i, lanes), VecU) : VecU{};
        const VecU odd = 2 * k + 1 < rows ? __builtin_convertvector(load_bits(row + stride + i, lanes), VecU) : VecU{};
        store(at(k, i), from_bits(even | (odd << 16)));
      }
    });
  }
}

// The transpose as a left operand of tiles: A[m, k] is element m of rows 2k and 2k + 1. `row`: words of a row of A.
template <class T>
void pack_columns(const T* source, int64_t stride, int64_t rows, int64_t dim, float* out, int64_t row) {
  for (int64_t k = 0; 2 * k < rows; k += W)
    for_each_vector(dim, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
      Vec v[W];
      for (int i = 0; i < W; ++i) {
        const int64_t first = 2 * (k + i);
        v[i] = zero();
        if (first >= rows) continue;
        const VecU even = __builtin_convertvector(load_bits(source + first * stride + d, lanes), VecU);
        const VecU odd =
            first + 1 < rows ? __builtin_convertvector(load_bits(source + (first + 1) * stride + d, lanes), VecU) : VecU{};
        v[i] = from_bits(even | (odd << 16));
      }
      transpose(v);
      for (int i = 0; i < W; ++i) store(out + d * row + k * 16 + i * 16, v[i]);
    });
}

// As a left operand: A[m, k] is word k of row m. Rows of `steps` words.
template <class T, class Compute>
void pack_left(const T* source, int64_t stride, int64_t rows, int64_t dim, float* out) {
  const int64_t steps = words_of<Compute>(dim);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < steps; k += W) {
      const Vec v = load_words<T, Compute>(source + m * stride, k, dim);
      if (Compute::tiles) store(out + m / 16 * 16 * steps + k * 16 + m % 16 * 16, v);
      else if (steps - k >= W) store(out + m * steps + k, v);
      else store(out + m * steps + k, v, First{static_cast<int>(steps - k)});
    }
}

// Whether rows can be read as a left operand where they lie; tiles would read rows past the last.
template <class T, class Compute>
TW_INLINE bool left_in_place(int64_t stride, int64_t dim) {
  return !Compute::tiles && kNative<T, Compute> && stride % Compute::per_word == 0 && dim % Compute::per_word == 0;
}

// Whether rows can be read as a right operand where they lie.
template <class T, class Compute>
TW_INLINE bool right_in_place(int64_t dim) {
  return kNative<T, Compute> && Compute::per_word == 1 && dim % W == 0;
}

}  // namespace
}  // namespace torchweld::cpu
