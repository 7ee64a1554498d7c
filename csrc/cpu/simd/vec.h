// The vector of this instruction set: W floats in GCC's vector extension, so arithmetic is written with operators and
// a*b + c contracts to one fused multiply-add. Loads convert from float, bf16 or fp16; stores round to nearest even.
// Tails are hidden in for_each_vector: its body is compiled once for whole vectors and once for the last, partial one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
  #include <immintrin.h>
#endif

#include "params.h"

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
typedef uint16_t VecH __attribute__((vector_size(2 * W)));  // W halves, as bits

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#define TW_INLINE inline __attribute__((always_inline))

TW_INLINE Vec splat(float x) { return x - Vec{}; }  // which keeps the sign of zero
TW_INLINE Vec zero() { return Vec{}; }
TW_INLINE VecU bits(Vec v) { return (VecU)v; }
TW_INLINE Vec from_bits(VecU v) { return (Vec)v; }
TW_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
TW_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }

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

// ---- How many lanes a load or store touches: all of them, or the first n (1 <= n < W).

struct All {
  static constexpr int count = W;
};

struct First {
  int count;
};

#if defined(__AVX512F__)
TW_INLINE __mmask16 mask_of(First lanes) { return static_cast<__mmask16>((1u << lanes.count) - 1); }
#elif defined(__AVX2__)
TW_INLINE __m256i mask_of(First lanes) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes.count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// `other` in the lanes that are not there.
TW_INLINE Vec keep(Vec v, All, float) { return v; }
TW_INLINE Vec keep(Vec v, First lanes, float other) {
  VecI index;
  for (int i = 0; i < W; ++i) index[i] = i;
  return index < (VecI{} + lanes.count) ? v : splat(other);
}

// ---- Conversions between 16 bits and float.

// In one instruction, where GCC takes a vector apart.
TW_INLINE VecU widen(VecH h) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VecU);
#endif
}

// Of values below 65536.
TW_INLINE VecH narrow(VecU u) {
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(__AVX2__)
  const __m256i halves = _mm256_packus_epi32((__m256i)u, (__m256i)u);  // of each 128 bits
  return (VecH)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0b1000));
#else
  return __builtin_convertvector(u, VecH);
#endif
}

TW_INLINE Vec widen_bf16(VecH h) { return from_bits(widen(h) << 16); }

TW_INLINE VecH round_bf16(Vec v) {
  const VecU u = bits(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU nan = (u >> 16) | 0x40u;
  return narrow(v == v ? rounded : nan);
}

TW_INLINE VecH narrow_bf16(Vec v) {
#if defined(__AVX512BF16__)
  const VecH rounded = (VecH)_mm512_cvtneps_pbh((__m512)v);
  const __mmask16 subnormal = _mm512_fpclass_ps_mask((__m512)v, 0x20);  // the instruction makes these zeros
  if (__builtin_expect(subnormal == 0, 1)) return rounded;
  return (VecH)_mm256_mask_mov_epi16((__m256i)rounded, subnormal, (__m256i)round_bf16(v));
#else
  return round_bf16(v);
#endif
}

TW_INLINE Vec widen_f16(VecH h) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent and mantissa move to float's places, scaling by 2^112 mends the bias and the subnormals.
  const VecU u = widen(h);
  const VecU magnitude = (u & 0x7fffu) << 13;
  const VecU scaled = bits(from_bits(magnitude) * 0x1p112f);
  const VecU finite_or_special = (magnitude >= VecU{} + 0x0f800000u) ? (magnitude | 0x7f800000u) : scaled;
  return from_bits(finite_or_special | ((u & 0x8000u) << 16));
#endif
}

TW_INLINE VecH narrow_f16(Vec v) {
#if defined(__AVX512F__)
  return (VecH)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (VecH)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecU sign = bits(v) & 0x80000000u;
  const VecU magnitude = bits(v) ^ sign;
  // Normal results: round the 13 bits that go, ties to even, then take 112 off the exponent.
  const VecU normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Subnormal results: adding 0.5 lets the float adder do the rounding at the right bit.
  const VecU subnormal = bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const VecU special = magnitude > VecU{} + 0x7f800000u ? VecU{} + 0x7e00u : VecU{} + 0x7c00u;
  const VecU result = magnitude >= VecU{} + 0x477ff000u  ? special
                      : magnitude < VecU{} + 0x38800000u ? subnormal
                                                         : normal;
  return __builtin_convertvector(result | (sign >> 16), VecH);
#endif
}

// ---- Load and store.

TW_INLINE VecH load_bits(const void* p, All) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return h;
}

TW_INLINE VecH load_bits(const void* p, First lanes) {
#if defined(__AVX512F__)
  return (VecH)_mm256_maskz_loadu_epi16(mask_of(lanes), p);
#else
  VecH h{};
  std::memcpy(&h, p, 2 * lanes.count);
  return h;
#endif
}

TW_INLINE void store_bits(void* p, VecH h, All) { std::memcpy(p, &h, sizeof h); }

TW_INLINE void store_bits(void* p, VecH h, First lanes) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, mask_of(lanes), (__m256i)h);
#else
  std::memcpy(p, &h, 2 * lanes.count);
#endif
}

// Bytes, a lane each.
TW_INLINE VecU load_bytes(const uint8_t* p, All) {
  typedef uint8_t Bytes __attribute__((vector_size(W)));
  Bytes b;
  std::memcpy(&b, p, sizeof b);
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu8_epi32((__m128i)b);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)b));
#else
  return __builtin_convertvector(b, VecU);
#endif
}

TW_INLINE VecU load_bytes(const uint8_t* p, First lanes) {
  uint8_t b[W] = {};
  std::memcpy(b, p, static_cast<size_t>(lanes.count));
  return load_bytes(b, All{});
}

TW_INLINE Vec load(const float* p, All) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

TW_INLINE Vec load(const float* p, First lanes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(mask_of(lanes), p);
#elif defined(__AVX2__)
  return (Vec)_mm256_maskload_ps(p, mask_of(lanes));
#else
  Vec v{};
  std::memcpy(&v, p, 4 * lanes.count);
  return v;
#endif
}

TW_INLINE void store(float* p, Vec v, All) { std::memcpy(p, &v, sizeof v); }

TW_INLINE void store(float* p, Vec v, First lanes) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, mask_of(lanes), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, mask_of(lanes), (__m256)v);
#else
  std::memcpy(p, &v, 4 * lanes.count);
#endif
}

// As `store`; returns the value that a load would give back.
template <class Lanes>
TW_INLINE Vec store_rounded(float* p, Vec v, Lanes lanes) {
  return store(p, v, lanes), v;
}
template <class Lanes>
TW_INLINE Vec store_rounded(bf16* p, Vec v, Lanes lanes) {
  const VecH h = narrow_bf16(v);
  return store_bits(p, h, lanes), widen_bf16(h);
}
template <class Lanes>
TW_INLINE Vec store_rounded(f16* p, Vec v, Lanes lanes) {
  const VecH h = narrow_f16(v);
  return store_bits(p, h, lanes), widen_f16(h);
}

// Past the caches, for outputs too large to be found there again: saves reading each line before it is overwritten.
// p must be aligned to the vector.
TW_INLINE void stream_bits(void* p, VecH h) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)h);
#else
  store_bits(p, h, All{});
#endif
}

TW_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v, All{});
#endif
}

template <class Lanes>
TW_INLINE Vec load(const bf16* p, Lanes lanes) {
  return widen_bf16(load_bits(p, lanes));
}
template <class Lanes>
TW_INLINE Vec load(const f16* p, Lanes lanes) {
  return widen_f16(load_bits(p, lanes));
}
template <class Lanes>
TW_INLINE void store(bf16* p, Vec v, Lanes lanes) {
  store_bits(p, narrow_bf16(v), lanes);
}
template <class Lanes>
TW_INLINE void store(f16* p, Vec v, Lanes lanes) {
  store_bits(p, narrow_f16(v), lanes);
}

TW_INLINE void stream(bf16* p, Vec v) { stream_bits(p, narrow_bf16(v)); }
TW_INLINE void stream(f16* p, Vec v) { stream_bits(p, narrow_f16(v)); }

// Whether an output [M, N] goes past the caches: too large to be found there again, rows on a vector's alignment.
template <class T>
bool past_cache(const void* output, int64_t rows, int64_t cols) {
  constexpr int64_t kCacheBytes = 8 << 20;
  const int64_t row_bytes = cols * sizeof(T);
  return rows * row_bytes >= kCacheBytes && row_bytes % (W * sizeof(T)) == 0 &&
         reinterpret_cast<uintptr_t>(output) % (W * sizeof(T)) == 0;
}

// An output row: streamed past the caches when `past_cache`, which asks that every row starts on a vector's alignment.
template <class T>
TW_INLINE void store_output(T* p, Vec v, All, bool past_cache) {
  past_cache ? stream(p, v) : store(p, v, All{});
}
template <class T>
TW_INLINE void store_output(T* p, Vec v, First lanes, bool) {
  store(p, v, lanes);
}

template <class T>
TW_INLINE Vec load(const T* p) {
  return load(p, All{});
}
template <class T>
TW_INLINE void store(T* p, Vec v) {
  store(p, v, All{});
}

// body(i, lanes) for the vectors that cover [0, n).
template <class Body>
TW_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, All{});
  if (i < n) body(i, First{static_cast<int>(n - i)});
}

// Two values that are summed side by side.
struct Pair {
  Vec first, second;
  TW_INLINE Pair& operator+=(Pair b) { return first += b.first, second += b.second, *this; }
};
struct PairOfSums {
  float first, second;
};
TW_INLINE Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
TW_INLINE Pair keep(Pair v, First lanes, float other) {
  return {keep(v.first, lanes, other), keep(v.second, lanes, other)};
}
TW_INLINE PairOfSums sum(Pair v) { return {sum(v.first), sum(v.second)}; }

// Sum over [0, n) of term(i, lanes), a Vec or a Pair. Four chains hide the latency of the adder. They have 32 vectors,
// and what they come to is added up in pairs: the roundings of equal terms would not cancel over a longer one.
template <class Term>
TW_INLINE auto sum_over(int64_t n, Term&& term) {
  using Terms = decltype(term(n, All{}));
  constexpr int64_t kStep = 4 * W, kChain = 32 * kStep;
  Terms partial[56];  // [k]: the sum of 2^k chains, where bit k of `chains` is set
  int64_t i = 0, chains = 0;
  while (i + kStep <= n) {
    const int64_t end = n - i < kChain ? n : i + kChain;
    Terms s0{}, s1{}, s2{}, s3{};
    for (; i + kStep <= end; i += kStep) {
      s0 += term(i, All{});
      s1 += term(i + W, All{});
      s2 += term(i + 2 * W, All{});
      s3 += term(i + 3 * W, All{});
    }
    s0 = (s0 + s1) + (s2 + s3);
    int k = 0;
    for (; chains >> k & 1; ++k) s0 += partial[k];
    partial[k] = s0;
    ++chains;
  }
  Terms total{};
  for (; i + W <= n; i += W) total += term(i, All{});
  if (i < n) {
    const First rest{static_cast<int>(n - i)};
    total += keep(term(i, rest), rest, 0.0f);
  }
  for (int k = 0; chains >> k > 0; ++k)
    if (chains >> k & 1) total += partial[k];
  return sum(total);
}

// ---- From run-time dtypes to types: f(Tag<T>{}).

template <class T>
struct Tag {
  using type = T;
};

template <class F>
TW_INLINE void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(Tag<float>{});
    case DType::bfloat16:
      return f(Tag<bf16>{});
    case DType::float16:
      return f(Tag<f16>{});
  }
}

}  // namespace
}  // namespace torchweld::cpu
