// Conversions between 16 bits and float; to nearest, ties to even.
#pragma once

#include "cpu/simd/lanes.h"

namespace torchweld::cpu {
namespace {

#if defined(__AVX512BF16__)
constexpr int kSubnormal = 0x20;  // of vfpclassps
#endif

// One instruction. GCC would convert lane by lane.
TW_INLINE VecU widen(VecH h) {
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VecU);
#endif
}

// The low halves of values below 65536.
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

#if defined(__SSE2__)
TW_INLINE VecHH narrow(VecU low, VecU high) {
  #if defined(__AVX512F__)
  typedef int16_t Index __attribute__((vector_size(4 * W)));
  Index even;
  for (int i = 0; i < 2 * W; ++i) even[i] = static_cast<int16_t>(2 * i);
  return (VecHH)_mm512_permutex2var_epi16((__m512i)low, (__m512i)even, (__m512i)high);
  #elif defined(__AVX2__)
  return (VecHH)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)low, (__m256i)high), 0b11011000);
  #else
  const VecI signed_low = (VecI)(low << 16) >> 16, signed_high = (VecI)(high << 16) >> 16;
  return (VecHH)_mm_packs_epi32((__m128i)signed_low, (__m128i)signed_high);
  #endif
}
#endif

TW_INLINE Vec widen_bf16(VecH h) { return from_bits(widen(h) << 16); }

// Rounds by integer addition. NaNs, which the addition would change, stay NaNs.
TW_INLINE VecU round_bf16(Vec v) {
  const VecU u = bits(v);
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU nan = (u >> 16) | 0x40u;
  return v == v ? rounded : nan;
}

TW_INLINE VecH narrow_bf16(Vec v) {
#if defined(__AVX512BF16__)
  const VecH rounded = (VecH)_mm512_cvtneps_pbh((__m512)v);
  const __mmask16 subnormal = _mm512_fpclass_ps_mask((__m512)v, kSubnormal);  // the instruction makes these zeros
  if (__builtin_expect(subnormal == 0, 1)) return rounded;
  return (VecH)_mm256_mask_mov_epi16((__m256i)rounded, subnormal, (__m256i)narrow(round_bf16(v)));
#else
  return narrow(round_bf16(v));
#endif
}

#if defined(__SSE2__)
// Two vectors in about the time of one. The instruction makes zeros of subnormal numbers. One test finds zeros in both
// vectors.
TW_INLINE VecHH narrow_bf16(Pair v) {
  #if defined(__AVX512BF16__)
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.second, (__m512)v.first);
  const __mmask32 zeros = _mm512_testn_epi16_mask(rounded, _mm512_set1_epi16(0x7fff));
  if (__builtin_expect(zeros == 0, 1)) return (VecHH)rounded;
  if ((_mm512_fpclass_ps_mask((__m512)v.first, kSubnormal) | _mm512_fpclass_ps_mask((__m512)v.second, kSubnormal)) == 0)
    return (VecHH)rounded;
  #endif
  return narrow(round_bf16(v.first), round_bf16(v.second));
}
#endif

TW_INLINE Vec widen_f16(VecH h) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)h);
#else
  // Exponent and mantissa move to their places in a float. A factor of 2^112 corrects the bias and the subnormals.
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
  // Normal results: round by the 13 bits that are cut off, ties to even, and subtract 112 from the exponent.
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

}  // namespace
}  // namespace torchweld::cpu
