// Activations y = x * s(x), s being a step from 0 to 1 that is smooth, with a = |x| and s in one of three forms:
//
//   silu        e = exp(-a)                                     s(-a) = e / (1 + e), s(a) = 1 / (1 + e)
//   GELU, tanh  e = exp(-2 sqrt(2 / pi) (a + 0.044715 a^3))     s(-a) = e / (1 + e), s(a) = 1 / (1 + e)
//   GELU        e = exp(-a^2 / 2)                               s(-a) = e * (1 / 2 - a t P(t)), t = 1 / (1 + a / 4)
//
// Of the last, s(a) = 1 - s(-a). Nothing overflows, and neither side cancels. P is a polynomial, fitted on [0, 14.5]
// for a relative error of s(-a) of 1.7e-8, or of 3.3e-5 where elements have 16 bits. One exponential and one division
// an element. Hendrycks, Gimpel: Gaussian Error Linear Units, arXiv:1606.08415. Elfwing, Uchibe, Doya: Sigmoid-Weighted
// Linear Units, arXiv:1702.03118.
#pragma once

#include "cpu/simd/exp.h"
#include "cpu/simd/vec.h"
#include "params/activation.h"

namespace torchweld::cpu {
namespace {

TW_INLINE VecI negative(Vec x) { return (VecI)x < 0; }  // -0 as well, for which either side will do
TW_INLINE Vec magnitude(Vec x) { return from_bits(bits(x) & 0x7fffffffu); }

// y and its derivative.
struct ValueAndSlope {
  Vec value, slope;
};

// |x|, but `most` at most: from there on e is 0, while its factors must be finite. So only an infinite x gives NaN, by
// x * 0.
TW_INLINE Vec distance(Vec x, float most) { return vmin(splat(most), magnitude(x)); }

// How exact e and the division are: to the last bits of float32, or to a fifth of an ulp of 16 bits or less.
template <class T>
struct Precision {
  static constexpr bool coarse = sizeof(T) == 2;
  static constexpr int degree = !coarse ? 6 : __is_same(T, bf16) ? 3 : 4;
  TW_INLINE static Vec reciprocal(Vec x) { return coarse ? vreciprocal(x) : 1.0f / x; }
  TW_INLINE static Vec quotient(Vec x, Vec y) { return coarse ? x * vreciprocal(y) : x / y; }
};

template <class T>
struct SiluForm {
  TW_INLINE static Vec value(Vec x) {
    const Vec e = exponential(distance(x, kMost));
    return Precision<T>::quotient(negative(x) ? x * e : x, 1.0f + e);
  }

  TW_INLINE static ValueAndSlope both(Vec x) {
    const Vec e = exponential(distance(x, kMost)), above = Precision<T>::reciprocal(1.0f + e), below = e * above;
    const Vec s = negative(x) ? below : above, rest = negative(x) ? above : below;
    return {x * s, s * (1.0f + x * rest)};
  }

 private:
  static constexpr float kMost = 128.0f;

  // exp(-a). What a * log2(e) is rounded by would be a large part of the result, so it is given back.
  TW_INLINE static Vec exponential(Vec a) {
    const Vec x = a * -kLog2e;
    if (Precision<T>::coarse) return exp2<Precision<T>::degree>(x);
    const Vec rest = fused(a, splat(-kLog2e), -x) - a * kLog2eRest;
    const Vec e = exp2<6>(x);
    return e + e * (rest * kLn2);
  }
};

template <class T>
struct TanhForm {
  TW_INLINE static Vec value(Vec x) {
    const Vec e = exponential(magnitude(x));
    return Precision<T>::quotient(negative(x) ? x * e : x, 1.0f + e);
  }

  TW_INLINE static ValueAndSlope both(Vec x) {
    const Vec a = distance(x, kMost), e = exponential(a), above = Precision<T>::reciprocal(1.0f + e), below = e * above;
    const Vec inner = a * a * static_cast<float>(3 * kSlope * kCubic) + static_cast<float>(kSlope);
    const Vec s = negative(x) ? below : above;
    return {x * s, s + x * (below * above * inner)};
  }

 private:
  static constexpr float kMost = 16.0f;
  static constexpr double kSlope = 1.5957691216057308, kCubic = 0.044715;  // 2 sqrt(2 / pi)

  TW_INLINE static Vec exponential(Vec a) {
    constexpr auto first = static_cast<float>(-kLog2eExact * kSlope), third = static_cast<float>(first * kCubic);
    return exp2<Precision<T>::degree>(a * (a * a * third + first));
  }
};

template <class T>
struct ExactForm {
  TW_INLINE static Vec value(Vec x) {
    const Vec a = distance(x, kMost), below = phi_below(a, density(a));
    return x * (negative(x) ? below : 1.0f - below);
  }

  TW_INLINE static ValueAndSlope both(Vec x) {
    constexpr float kDensity = 0.398942280401432678f;  // 1 / sqrt(2 pi)
    const Vec a = distance(x, kMost), e = density(a), below = phi_below(a, e);
    const Vec phi = negative(x) ? below : 1.0f - below;
    return {x * phi, phi + x * (e * kDensity)};
  }

 private:
  static constexpr float kMost = 16.0f;

  TW_INLINE static Vec density(Vec a) {
    return exp2<Precision<T>::degree>(a * a * static_cast<float>(-kLog2eExact / 2));
  }

  TW_INLINE static Vec phi_below(Vec a, Vec e) {
    const Vec t = Precision<T>::reciprocal(a * 0.25f + 1.0f);
    if constexpr (Precision<T>::coarse) {
      Vec y = t * 6.170771053e-02f + 3.209923972e-02f;
      y = y * t + 8.103884367e-02f;
      y = y * t + 9.925132806e-02f;
      y = y * t + 1.250402563e-01f;
      return e * (0.5f - a * (t * y));
    }
    Vec y = t * 8.419646882e-03f - 4.023784027e-02f;
    y = y * t + 5.755265802e-02f;
    y = y * t - 2.447182313e-02f;
    y = y * t + 5.048383027e-02f;
    y = y * t + 4.603891820e-02f;
    y = y * t + 7.619734854e-02f;
    y = y * t + 9.995426983e-02f;
    y = y * t + 1.250050515e-01f;
    return e * (0.5f - a * (t * y));
  }
};

// f(Tag<T>, Tag<form>).
template <class F>
void dispatch_activation(DType dtype, Activation activation, F&& f) {
  dispatch(dtype, [&](auto tag) {
    switch (activation) {
      case Activation::silu:
        return f(tag, Tag<SiluForm<typename decltype(tag)::type>>{});
      case Activation::gelu:
        return f(tag, Tag<ExactForm<typename decltype(tag)::type>>{});
      case Activation::gelu_tanh:
        return f(tag, Tag<TanhForm<typename decltype(tag)::type>>{});
    }
  });
}

}  // namespace
}  // namespace torchweld::cpu
