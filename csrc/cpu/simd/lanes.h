// The vector of this instruction set, W floats, and the lanes that an operation touches. It is of GCC's vector
// extension: arithmetic is written with operators, and a*b + c contracts to one fused multiply-add.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
  #include <immintrin.h>
#endif

namespace torchweld::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t VecI __attribute__((vector_size(4 * W)));
typedef uint32_t VecU __attribute__((vector_size(4 * W)));
typedef uint16_t VecH __attribute__((vector_size(2 * W)));   // W halves, as bits
typedef uint16_t VecHH __attribute__((vector_size(4 * W)));  // 2 W of them

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#define TW_INLINE inline __attribute__((always_inline))
#define TW_NOINLINE __attribute__((noinline))  // compiled once for all callers

TW_INLINE Vec splat(float x) { return x - Vec{}; }  // keeps the sign of zero
TW_INLINE Vec zero() { return Vec{}; }
TW_INLINE VecU bits(Vec v) { return (VecU)v; }
TW_INLINE Vec from_bits(VecU v) { return (Vec)v; }

// a > b ? a : b and a < b ? a : b, so b where one of them is NaN: one instruction, where GCC compares and blends.
// GCC 12 warns of the intrinsics without a mask.
TW_INLINE Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

TW_INLINE Vec vmin(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// 1 / v of normal numbers to 14 bits or more, in a fraction of a division's time.
TW_INLINE Vec vreciprocal(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
#elif defined(__AVX2__)
  const Vec r = (Vec)_mm256_rcp_ps((__m256)v);  // to 11 bits; a step of Newton's doubles them
  return r * (2.0f - v * r);
#else
  return 1.0f / v;
#endif
}

TW_INLINE Vec vsqrt(Vec v) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < W; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// a * b + c of terms that may cancel: the product is not rounded. Where there is no fused multiply-add, the sum is
// taken in float64. By name, since the compiler contracts no product that is used elsewhere too.
TW_INLINE Vec fused(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif !defined(__SSE2__)
  for (int i = 0; i < W; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  typedef double Wide __attribute__((vector_size(8 * W)));
  return __builtin_convertvector(
      __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) + __builtin_convertvector(c, Wide), Vec);
#endif
}

// Lanes folded in halves, log2(W) times, by `op`: the order of a tree.
template <class Op>
TW_INLINE float fold(Vec v, Op&& op) {
  VecI index;
  for (int i = 0; i < W; ++i) index[i] = i;
  for (int half = W / 2; half > 0; half /= 2) v = op(v, (Vec)__builtin_shuffle(v, index ^ half));
  return v[0];
}

TW_INLINE float sum(Vec v) {
  return fold(v, [](Vec a, Vec b) __attribute__((always_inline)) { return a + b; });
}
TW_INLINE float max_of(Vec v) {
  return fold(v, [](Vec a, Vec b) __attribute__((always_inline)) { return vmax(a, b); });
}

// ---- How many lanes a load or store touches: all of them, the first n (1 <= n < W), or those of two vectors.

struct All {
  static constexpr int count = W;
};

struct First {
  int count;
};

struct Two {};  // all lanes of two neighbouring vectors, a Pair

#if defined(__AVX512F__)
TW_INLINE __mmask16 mask_of(First lanes) { return static_cast<__mmask16>((1u << lanes.count) - 1); }
#elif defined(__AVX2__)
TW_INLINE __m256i mask_of(First lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// v, with `other` in the lanes past the first ones.
TW_INLINE Vec keep(Vec v, All, float) { return v; }
TW_INLINE Vec keep(Vec v, First lanes, float other) {
  VecI index;
  for (int i = 0; i < W; ++i) index[i] = i;
  return index < (VecI{} + lanes.count) ? v : splat(other);
}

// Two vectors: neighbours in memory, or terms that are summed in one pass.
struct Pair {
  Vec first, second;
  TW_INLINE Pair& operator+=(Pair b) { return first += b.first, second += b.second, *this; }
};
struct PairOfSums {
  float first, second;
};
TW_INLINE Pair beside(Vec first, Vec second) { return {first, second}; }
TW_INLINE Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
TW_INLINE Pair keep(Pair v, First lanes, float other) {
  return {keep(v.first, lanes, other), keep(v.second, lanes, other)};
}
TW_INLINE PairOfSums sum(Pair v) { return {sum(v.first), sum(v.second)}; }

}  // namespace
}  // namespace torchweld::cpu
