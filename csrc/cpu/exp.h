// exp2 and tanh on vectors. exp2 splits x = n + f with n = floor(x), takes 2^f from a minimax polynomial on [0, 1) and
// puts n into the exponent. -inf gives 0 and NaN gives NaN, so masks need no branch. The coefficients are Remez fits of
// the relative error, which is 2.6e-6 for degree 4 (enough below bf16) and 7.5e-8 for degree 5.
#pragma once

#include "cpu/vec.h"

namespace torchweld::cpu {
namespace {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

template <int kDegree>
TW_INLINE Vec exp2(Vec x) {
  static_assert(kDegree == 4 || kDegree == 5, "only these have coefficients");
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
#elif defined(__AVX2__)
  x = x < splat(-127.0f) ? splat(-127.0f) : x;
  const Vec n = (Vec)_mm256_floor_ps((__m256)x);
  const Vec f = x - n;
#else
  x = x < splat(-127.0f) ? splat(-127.0f) : x;
  const Vec truncated = __builtin_convertvector(__builtin_convertvector(x, VecI), Vec);
  const Vec n = truncated - (truncated > x ? splat(1.0f) : zero());
  const Vec f = x - n;
#endif
  Vec y;
  if constexpr (kDegree == 4) {
    y = f * 1.353416792e-02f + 5.201146061e-02f;
    y = y * f + 2.414427569e-01f;
    y = y * f + 6.930038345e-01f;
    y = y * f + 1.000002593e+00f;
  } else {
    y = f * 1.877576675e-03f + 8.989340090e-03f;
    y = y * f + 5.582631805e-02f;
    y = y * f + 2.401536170e-01f;
    y = y * f + 6.931530732e-01f;
    y = y * f + 9.999999251e-01f;
  }
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
  // n = -127 makes the factor's bits zero: everything below the normal numbers is flushed.
  return y * from_bits((VecU)((__builtin_convertvector(n, VecI) + 127) << 23));
#endif
}

// An odd polynomial near zero, where 1 - exp would cancel.
TW_INLINE Vec vtanh(Vec x) {
  const Vec magnitude = from_bits(bits(x) & 0x7fffffffu), z = x * x;
  Vec y = z * -5.852168639e-03f + 2.075362887e-02f;
  y = y * z - 5.376870470e-02f;
  y = y * z + 1.333168896e-01f;
  y = y * z - 3.333328326e-01f;
  const Vec small = x + x * z * y;
  const Vec e = exp2<5>(magnitude * (-2.0f * kLog2e));
  const Vec large = from_bits(bits((1.0f - e) / (1.0f + e)) | (bits(x) & 0x80000000u));
  return magnitude < splat(0.6f) ? small : large;
}

}  // namespace
}  // namespace torchweld::cpu
