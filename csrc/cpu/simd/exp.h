// exp2, log and tanh on vectors. exp2 splits x = n + f with n = floor(x), takes 2^f from a minimax polynomial on [0, 1)
// and puts n into the exponent. -inf gives 0, 128 and more inf, and NaN NaN, so neither masks nor what overflows need a
// branch. The coefficients are Remez fits of the relative error under the condition that exp2(0) = 1: 8.6e-5 for degree
// 3 (a twentieth of an ulp of bf16), 2.9e-6 for degree 4, 8.2e-8 for degree 5 and 1.4e-8 for degree 6.
#pragma once

#include "cpu/simd/vec.h"

namespace torchweld::cpu {
namespace {

constexpr double kLog2eExact = 1.44269504088896341;
constexpr float kLog2e = static_cast<float>(kLog2eExact), kLog2eRest = static_cast<float>(kLog2eExact - kLog2e),
                kLn2 = 0.693147180559945309f;

// x between `least` and `most`. NaN stays.
TW_INLINE Vec within(Vec x, float least, float most) { return vmin(splat(most), vmax(splat(least), x)); }

template <int kDegree>
TW_INLINE Vec exp2(Vec x) {
  static_assert(kDegree >= 3 && kDegree <= 6, "only these have coefficients");
#if defined(__AVX512F__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 1);  // x - floor(x)
#elif defined(__AVX2__)
  x = within(x, -127.0f, 128.0f);
  const Vec n = (Vec)_mm256_floor_ps((__m256)x);
  const Vec f = x - n;
#else
  x = within(x, -127.0f, 128.0f);
  const Vec truncated = __builtin_convertvector(__builtin_convertvector(x, VecI), Vec);
  const Vec n = truncated - (truncated > x ? splat(1.0f) : zero());
  const Vec f = x - n;
#endif
  Vec y;
  if constexpr (kDegree == 3) {
    y = f * 7.706717405e-02f + 2.276448474e-01f;
    y = y * f + 6.951168188e-01f;
  } else if constexpr (kDegree == 4) {
    y = f * 1.342668427e-02f + 5.224247422e-02f;
    y = y * f + 2.412802048e-01f;
    y = y * f + 6.930448449e-01f;
  } else if constexpr (kDegree == 5) {
    y = f * 1.867130070e-03f + 9.017030322e-03f;
    y = y * f + 5.579991310e-02f;
    y = y * f + 2.401644502e-01f;
    y = y * f + 6.931513118e-01f;
  } else {
    y = f * 2.171502565e-04f + 1.244087704e-03f;
    y = y * f + 9.678063914e-03f;
    y = y * f + 5.548415333e-02f;
    y = y * f + 2.402295172e-01f;
    y = y * f + 6.931470037e-01f;
  }
  y = y * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
  // n = -127 makes the factor's bits zero: everything below the normal numbers is flushed. n = 128 makes them inf.
  return y * from_bits((VecU)((__builtin_convertvector(n, VecI) + 127) << 23));
#endif
}

// exp(x) of x <= 0 to about an ulp. The rounding of x * log2(e) grows with x, so whole multiples of log(2) are
// subtracted first, in two parts. The first part has few bits, so its products are exact. Far below the least number
// what is left would be a rounding of x, large enough for exp2 to overflow.
TW_INLINE Vec exp_of_negative(Vec x) {
  x = vmax(splat(-200.0f), x);
  const Vec n = __builtin_convertvector(__builtin_convertvector(x * kLog2e, VecI), Vec);
  const Vec rest = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  return exp2<6>(rest * kLog2e) * exp2<3>(n);
}

// log(x) of positive normal numbers, to about an ulp, of infinity and NaN: x = 2^n m with m within a factor of sqrt(2)
// of
// 1. log(m) is the series of 2 atanh(s), s = (m - 1) / (m + 1), whose fifth term is below a rounding.
TW_INLINE Vec vlog(Vec x) {
  const VecI n = ((VecI)x - 0x3f3504f3) >> 23;
  const Vec m = from_bits((VecU)((VecI)x - n * (1 << 23)));
  const Vec s = (m - 1.0f) / (m + 1.0f), z = s * s;
  Vec y = z * (1.0f / 9) + 1.0f / 7;
  y = y * z + 1.0f / 5;
  y = y * z + 1.0f / 3;
  y = 2.0f * s + (2.0f * s * z) * y;
  y = __builtin_convertvector(n, Vec) * kLn2 + y;
  return x < splat(__builtin_inff()) ? y : x;
}

// tanh(x): an odd polynomial near zero, where 1 - exp would cancel.
TW_INLINE Vec vtanh(Vec x) {
  const Vec magnitude = from_bits(bits(x) & 0x7fffffffu), z = x * x;
  Vec y = z * -5.852168639e-03f + 2.075362887e-02f;
  y = y * z - 5.376870470e-02f;
  y = y * z + 1.333168896e-01f;
  y = y * z - 3.333328326e-01f;
  const Vec small = magnitude + magnitude * z * y;
  const Vec e = exp2<6>(magnitude * (-2.0f * kLog2e));
  const Vec large = (1.0f - e) / (1.0f + e);
  return from_bits(bits(magnitude < splat(0.6f) ? small : large) | (bits(x) & 0x80000000u));
}

}  // namespace
}  // namespace torchweld::cpu
