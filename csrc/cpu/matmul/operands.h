// The operands of the matrix products: their formats, and where their words lie in memory.
//
// Operands are words of 32 bits, each one float or a pair of bf16 that are neighbours along k, the dimension that is
// summed over; a step of k is one word. A format says what a word is and how the product of two is taken.
// `ComputeOf<T>` is the format by which elements of T are multiplied on this instruction set.
#pragma once

#include "cpu/matmul/tile_layout.h"
#include "cpu/simd/integers.h"

namespace torchweld::cpu {
namespace {

// 24 + 4 + 1 of 32 registers with AVX-512, 12 + 2 + 1 of 16 without.
constexpr int kRows = 6;
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif
constexpr int kPanel = kVectors * W;

// A format: its words, their products, and the units of operands. Packing converts elements of other types to words. A
// sum is cut into chains of `chain` steps, because the rounding error of float32 grows with the length of a chain, and
// in blocks of fewer than kRows rows, or of one vector, into chains of `narrow_chain` steps.
struct Fp32 {
  static constexpr int per_word = 1, exp_degree = 5;
  static constexpr int parts = 1;  // an element is the sum of so many parts, each in its own word
  static constexpr bool tiles = false;
  static constexpr int64_t chain = 64, narrow_chain = chain;
  static constexpr int64_t block_rows = kRows;  // rows of C that share a span of columns or of steps
  static constexpr int64_t step_unit = 1;    // operands are padded with zeros to a multiple of so many words of a part
  static constexpr int64_t column_unit = W;  // and to a multiple of so many columns
  static constexpr int64_t panel = kPanel;   // columns of a right operand that lie side by side
  TW_INLINE static Vec dot(Vec a, Vec b, Vec c) { return a * b + c; }

  // To write a left operand: where row m begins, where element i is in a row, and a store of elements from i on.
  TW_INLINE static float* row_of(float* data, int64_t row, int64_t m) { return data + m * row; }
  TW_INLINE static int64_t element(int64_t i) { return i; }
  TW_INLINE static void store_row(float* row, int64_t i, Vec v) { store(row + i, v); }
  TW_INLINE static void store_row(float* row, int64_t i, Vec first, Vec second) {
    store(row + i, first);
    store(row + i + W, second);
  }
};

// `ComputeOf<T>`: the format of products of T on this instruction set. `VectorComputeOf<T>`: the same without AMX
// tiles.
template <class T>
struct ComputeOf {
  using type = Fp32;
};
template <class T>
struct VectorComputeOf {
  using type = Fp32;
};

// v as a sum of kParts bf16, in the upper halves of words. A part is rounded, with half an ulp up. The last of several
// parts needs no rounding: three hold a float32, two a float16.
template <int kParts>
TW_INLINE void split(Vec v, VecU (&part)[kParts]) {
  for (int n = 0; n < kParts; ++n) {
    const bool last = kParts > 1 && n == kParts - 1;
    part[n] = (last ? bits(v) : bits(v) + 0x8000u) & 0xffff0000u;
    if (n < kParts - 1) v = v - from_bits(part[n]);
  }
}

// Upper halves as pairs of bf16: neighbours in two vectors, or along `first` and then along `second`.
TW_INLINE Vec pairs(VecU even, VecU odd) { return from_bits((even >> 16) | (odd & 0xffff0000u)); }

#if defined(__AVX512BF16__)
TW_INLINE Vec in_order(VecU first, VecU second) {
  typedef uint16_t Halves __attribute__((vector_size(4 * W)));
  Halves upper;
  for (int i = 0; i < 2 * W; ++i) upper[i] = static_cast<uint16_t>(2 * i + 1);
  return (Vec)shuffle((Halves)first, (Halves)second, upper);
}

struct Bf16Pairs : Fp32 {
  static constexpr int per_word = 2, exp_degree = 3;
  static constexpr int64_t chain = 128, narrow_chain = chain;
  TW_INLINE static Vec dot(Vec a, Vec b, Vec c) { return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
  TW_INLINE static void store_row(float* row, int64_t i, Vec v) { store(reinterpret_cast<bf16*>(row) + i, v); }
  TW_INLINE static void store_row(float* row, int64_t i, Vec first, Vec second) {
    store(row + i / 2, (Vec)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
  }
};

template <>
struct VectorComputeOf<bf16> {
  using type = Bf16Pairs;
};

  #if defined(__AMX_BF16__)
// By the tile registers of amx.h, which hold 16 rows of 16 words. float16 is the sum of two bf16, and float32 that of
// three.
template <int kParts>
struct Tiles : Bf16Pairs {
  using Layout = TileLayout<kParts>;
  static constexpr int parts = kParts, exp_degree = kParts + 2;
  static constexpr bool tiles = true;
  static constexpr int64_t block_rows = 2 * Layout::side, step_unit = Layout::side, column_unit = 2 * Layout::side,
                           panel = Layout::side;
  TW_INLINE static float* row_of(float* data, int64_t row, int64_t m) { return data + Layout::left(m, 0, row); }
  TW_INLINE static int64_t element(int64_t i) { return Layout::element(i); }
  TW_INLINE static void store_row(float* row, int64_t i, Vec v) {
    if constexpr (kParts == 1) return Bf16Pairs::store_row(row, element(i), v);
    VecU part[kParts];
    split(v, part);
    for (int n = 0; n < kParts; ++n)
      store_bits(reinterpret_cast<bf16*>(row) + element(i) + n * 2 * Layout::block, narrow(part[n] >> 16), All{});
  }
  TW_INLINE static void store_row(float* row, int64_t i, Vec first, Vec second) {  // i a multiple of 32
    if constexpr (kParts == 1) return Bf16Pairs::store_row(row, element(i), first, second);
    VecU part[2][kParts];
    split(first, part[0]);
    split(second, part[1]);
    for (int n = 0; n < kParts; ++n) store(row + element(i) / 2 + n * Layout::block, in_order(part[0][n], part[1][n]));
  }
};

template <>
struct ComputeOf<bf16> {
  using type = Tiles<1>;
};
template <>
struct ComputeOf<f16> {
  using type = Tiles<2>;
};
template <>
struct ComputeOf<float> {
  using type = Tiles<3>;
};
  #else
template <>
struct ComputeOf<bf16> {
  using type = Bf16Pairs;
};
  #endif
#endif

// Words, or steps, of `count` elements, up to whole units.
template <class Compute>
TW_INLINE int64_t words_of(int64_t count) {
  return round_up(ceil_div(count, Compute::per_word), Compute::step_unit) * Compute::parts;
}

// With tiles, both operands lie as TileLayout says.
struct Left {  // A[m, k] at data + m * row + k * step
  const float* data;
  int64_t row, step;
};

struct Right {  // B[k, n] at data + n / Compute::panel * panel + k * step + n % Compute::panel
  const float* data;
  int64_t step, panel;
};

struct Span {
  int64_t begin, end;
};

// The steps that hold elements [low, high).
template <class Compute>
TW_INLINE Span steps_between(int64_t low, int64_t high) {
  if (low >= high) return {0, 0};
  return {low / Compute::per_word / Compute::step_unit * Compute::step_unit * Compute::parts, words_of<Compute>(high)};
}

TW_INLINE Left rows_from(const Left& a, int64_t m) { return {a.data + m * a.row, a.row, a.step}; }

// The work between the steps of a product where the caller has none.
struct Nothing {
  TW_INLINE void operator()() const {}
};

}  // namespace
}  // namespace torchweld::cpu
