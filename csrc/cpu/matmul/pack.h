// From rows of elements in memory, with any stride between them, to the operands of matmul.h. Rows past the end and the
// rest of a vector become zero, so the products need no masks.
#pragma once

#include "cpu/matmul/matmul.h"

namespace torchweld::cpu {
namespace {

// Whether elements of T in memory are already words of Compute.
template <class T, class Compute>
constexpr bool kNative = Compute::parts == 1 && sizeof(T) * Compute::per_word == 4;

// For shuffles of two vectors: lane n of the first, lane n of the second, in turn; of their lower and upper halves.
TW_INLINE void interleave_halves(VecI& low, VecI& high) {
  for (int i = 0; i < W; ++i) {
    low[i] = i / 2 + (i % 2) * W;
    high[i] = low[i] + W / 2;
  }
}

// W x W: row i becomes column i. Each round interleaves the two halves; after log2(W) rounds that is the transpose.
TW_INLINE void transpose(Vec (&v)[W]) {
  VecI low, high;
  interleave_halves(low, high);
  for (int round = 1; round < W; round *= 2) {
    Vec next[W];
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = shuffle(v[i], v[i + W / 2], low);
      next[2 * i + 1] = shuffle(v[i], v[i + W / 2], high);
    }
    for (int i = 0; i < W; ++i) v[i] = next[i];
  }
}

// Lane n of the result is all lanes of group[n], reduced by f: a transpose in which each round halves the vectors.
template <class F>
TW_INLINE Vec reduce(Vec (&group)[W], F&& f) {
  VecI low, high;
  interleave_halves(low, high);
  for (int half = W / 2; half > 0; half /= 2)
    for (int n = 0; n < half; ++n)
      group[n] = f(shuffle(group[n], group[n + half], low), shuffle(group[n], group[n + half], high));
  return group[0];
}

// Words [word, word + W) of each part of a row of `dim` elements.
template <class T, class Compute>
TW_INLINE void load_words(const T* row, int64_t word, int64_t dim, Vec (&words)[Compute::parts]) {
  const int64_t first = word * Compute::per_word, left = dim - first;
  auto vector = [&](int64_t i) {
    return left >= i + W ? load(row + first + i) : load(row + first + i, First{static_cast<int>(max_of(left - i, 0))});
  };
  if constexpr (Compute::per_word == 1) {
    words[0] = vector(0);
  } else if constexpr (kNative<T, Compute>) {
    if (left >= 2 * W) std::memcpy(words, row + first, sizeof words);
#if defined(__AVX512BW__)
    else if (left > 0)
      words[0] = (Vec)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), row + first);
#endif
    else
      words[0] = Vec{};
  } else {
    VecU part[2][Compute::parts];
    for (int i = 0; i < 2; ++i) split(vector(i * W), part[i]);
    for (int n = 0; n < Compute::parts; ++n) words[n] = in_order(part[0][n], part[1][n]);
  }
}

// Vectors of two neighbouring rows, or of zeros, as words of pairs.
template <class T, class Compute, class Lanes>
TW_INLINE void load_pairs(const T* row, int64_t stride, bool even, bool odd, Lanes lanes,
                          Vec (&words)[Compute::parts]) {
  if constexpr (kNative<T, Compute>) {
    const VecU first = even ? widen(load_bits(row, lanes)) : VecU{},
               second = odd ? widen(load_bits(row + stride, lanes)) : VecU{};
    words[0] = from_bits(first | (second << 16));
    return;
  }
  VecU part[2][Compute::parts];
  split(even ? load(row, lanes) : zero(), part[0]);
  split(odd ? load(row + stride, lanes) : zero(), part[1]);
  for (int n = 0; n < Compute::parts; ++n) words[n] = pairs(part[0][n], part[1][n]);
}

// The transpose as a right operand: B[k, n] is word k of row n. Panels of that many rows, each [dim in words][panel].
template <class T, class Compute>
void pack_transposed(const T* source, int64_t stride, int64_t rows, int64_t dim, float* out) {
  constexpr int64_t kPanel = Compute::panel, kParts = Compute::parts;
  const int64_t steps = words_of<Compute>(dim);
  for (int64_t n = 0; n < round_up(rows, Compute::column_unit); n += W) {
    float* panel = out + n / kPanel * steps * kPanel + n % kPanel;
    for (int64_t k = 0; k < steps; k += W * kParts) {
      Vec v[kParts][W];
      for (int i = 0; i < W; ++i) {
        Vec words[kParts] = {};
        if (n + i < rows) load_words<T, Compute>(source + (n + i) * stride, k / kParts, dim, words);
        for (int part = 0; part < kParts; ++part) v[part][i] = words[part];
      }
      for (int part = 0; part < kParts; ++part) {
        transpose(v[part]);
        float* block = panel + (k + part * W) * kPanel;
        const int64_t count = min_of(W, steps - k);
        if (count == W) {
          for (int i = 0; i < W; ++i) store(block + i * kPanel, v[part][i]);
        } else {
          for (int i = 0; i < count; ++i) store(block + i * kPanel, v[part][i]);
        }
      }
    }
  }
}

// As a right operand: B[k, n] is element n of row k, or of rows 2k and 2k + 1. Rows of round_up(dim, W) words; with
// tiles, columns of blocks that are `panel` words apart.
template <class T, class Compute>
void pack_rows(const T* source, int64_t stride, int64_t rows, int64_t dim, float* out, int64_t panel) {
  const int64_t width = round_up(dim, W);
  if constexpr (Compute::tiles) {
    for (int64_t k = 0; k < words_of<Compute>(rows) / Compute::parts; ++k)
      for_each_vector(dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        Vec words[Compute::parts];
        load_pairs<T, Compute>(source + 2 * k * stride + i, stride, 2 * k < rows, 2 * k + 1 < rows, lanes, words);
        float* to = out + Compute::Layout::right(k, 0, panel) + Compute::Layout::strip(i, panel);
        for (int n = 0; n < Compute::parts; ++n) store(to + n * Compute::Layout::block, words[n]);
      });
  } else {
    for (int64_t k = 0; k < words_of<Compute>(rows); ++k)
      for_each_vector(dim, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        Vec words[1];
        if constexpr (Compute::per_word == 1)
          words[0] = load(source + k * stride + i, lanes);
        else
          load_pairs<T, Compute>(source + 2 * k * stride + i, stride, 2 * k < rows, 2 * k + 1 < rows, lanes, words);
        store(out + k * width + i, words[0]);
      });
  }
}

// The transpose as a left operand of tiles: A[m, k] is element m of rows 2k and 2k + 1. `row`: words of a row of A.
template <class T, class Compute>
void pack_columns(const T* source, int64_t stride, int64_t rows, int64_t dim, float* out, int64_t row) {
  using Layout = typename Compute::Layout;
  constexpr int kParts = Compute::parts;
  for (int64_t k = 0; 2 * k < rows; k += W)
    for_each_vector(dim, [&](int64_t d, auto lanes) __attribute__((always_inline)) {
      Vec v[kParts][W];
      for (int i = 0; i < W; ++i) {
        const int64_t first = 2 * (k + i);
        Vec words[kParts];
        load_pairs<T, Compute>(source + first * stride + d, stride, first < rows, first + 1 < rows, lanes, words);
        for (int n = 0; n < kParts; ++n) v[n][i] = words[n];
      }
      for (int n = 0; n < kParts; ++n) {
        transpose(v[n]);
        float* block = out + Layout::strip(d, Layout::side * row) + Layout::block_of(k) + n * Layout::block;
        for (int i = 0; i < W; ++i) store(block + i * Layout::side, v[n][i]);
      }
    });
}

// As a left operand: A[m, k] is word k of row m. Rows of `steps` words.
template <class T, class Compute>
void pack_left(const T* source, int64_t stride, int64_t rows, int64_t dim, float* out) {
  const int64_t steps = words_of<Compute>(dim);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < steps; k += W * Compute::parts) {
      Vec words[Compute::parts];
      load_words<T, Compute>(source + m * stride, k / Compute::parts, dim, words);
      if constexpr (Compute::tiles) {
        using Layout = typename Compute::Layout;
        for (int n = 0; n < Compute::parts; ++n)
          store(out + Layout::left(m, k / Compute::parts, steps) + n * Layout::block, words[n]);
      } else if (steps - k >= W) {
        store(out + m * steps + k, words[0]);
      } else {
        store(out + m * steps + k, words[0], First{static_cast<int>(steps - k)});
      }
    }
}

// Whether rows can be read in place as a left operand. Tiles cannot: they would read rows past the last.
template <class T, class Compute>
TW_INLINE bool left_in_place(int64_t stride, int64_t dim) {
  return !Compute::tiles && kNative<T, Compute> && stride % Compute::per_word == 0 && dim % Compute::per_word == 0;
}

// Whether rows can be read in place as a right operand.
template <class T, class Compute>
TW_INLINE bool right_in_place(int64_t dim) {
  return kNative<T, Compute> && Compute::per_word == 1 && dim % W == 0;
}

}  // namespace
}  // namespace torchweld::cpu
