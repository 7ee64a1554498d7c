// Activations y = x * s(x), s being a smooth step from 0 to 1, with a = |x|:
//
//   silu           e = exp(-a)                                           s(-a) = e / (1 + e), s(a) = 1 / (1 + e)
//   GELU, tanh     u = sqrt(2 / pi) (a + 0.044715 a^3), e = exp(-2 u)    s(-a) = e / (1 + e), s(a) = 1 / (1 + e)
//     float32, u < 0.6: s(-a) = (1 - tanh(u)) / 2, s(a) = (1 + tanh(u)) / 2
//   GELU, 16-bit   e = exp(-a^2 / 2), t = 1 / (1 + 3 a / 8)              s(-a) = e * t * R(t), s(a) = 1 - s(-a)
//   GELU, float32  s = Phi, as CUDA computes it
//
// Nothing overflows, and neither side cancels. Near zero the instructions for exp and 1 / x are 2 ulp and 1 ulp off,
// and a polynomial for tanh is not. R is a polynomial, fitted on [0, 16] for a relative error of s(-a) of 2.1e-6: a two
// hundredth of a rounding to float16. Hendrycks, Gimpel: Gaussian Error Linear Units, arXiv:1606.08415. Elfwing,
// Uchibe, Doya: Sigmoid-Weighted Linear Units, arXiv:1702.03118.
#pragma once

#include "cuda/ptx.cuh"

namespace torchweld::cuda::activation {

// y and its derivative.
struct ValueAndSlope {
  float value, slope;
};

// |x|, but `most` at most: from there on e is 0, while its factors must be finite. So only an infinite x gives NaN, by
// x * 0.
__device__ __forceinline__ float distance(float x, float most = 16.0f) { return fminf(fabsf(x), most); }

template <class T>
struct SiluForm {
  static __device__ __forceinline__ float value(float x) {
    const float e = exponential(x);
    return (x < 0.0f ? x * e : x) * inverse(1.0f + e);
  }

  static __device__ __forceinline__ ValueAndSlope both(float x) {
    const float e = exponential(x), above = inverse(1.0f + e), below = e * above;
    const float s = x < 0.0f ? below : above, rest = x < 0.0f ? above : below;
    return {x * s, s * (x * rest + 1.0f)};
  }

 private:
  // exp(-a) as CUDA computes it. A rounding of a * log2(e) would be a large part of the result, and bfloat16 shows
  // results below the least normal float, which the instruction for 2^x makes zeros of.
  static __device__ __forceinline__ float exponential(float x) { return expf(-distance(x, 128.0f)); }

  // 1 / y, in float32 with one step of Newton's method.
  static __device__ __forceinline__ float inverse(float y) {
    const float r = ptx::reciprocal(y);
    return std::is_same_v<T, float> ? __fmaf_rn(r, __fmaf_rn(-y, r, 1.0f), r) : r;
  }
};

template <class T>
struct TanhForm {
  static __device__ __forceinline__ float value(float x) {
    const Steps s(distance(x));
    return x * (x < 0.0f ? s.below : s.above);
  }

  static __device__ __forceinline__ ValueAndSlope both(float x) {
    const float a = distance(x);
    const Steps step(a);
    const float inner = a * a * static_cast<float>(6 * kSlope * kCubic) + static_cast<float>(2 * kSlope);
    const float s = x < 0.0f ? step.below : step.above;
    return {x * s, s + x * (step.below * step.above * inner)};
  }

 private:
  static constexpr double kSlope = 0.797884560802865356, kCubic = 0.044715;  // sqrt(2 / pi)

  // s(-a) and s(a).
  struct Steps {
    float below, above;

    __device__ __forceinline__ explicit Steps(float a) {
      const float u = a * (a * a * static_cast<float>(kSlope * kCubic) + static_cast<float>(kSlope));
      const float e = ptx::exp2(u * (-2 * kLog2e));
      above = ptx::reciprocal(1.0f + e);
      below = e * above;
      if constexpr (std::is_same_v<T, float>) {
        const float z = u * u;
        float y = z * -5.852168639e-03f + 2.075362887e-02f;  // (tanh(u) - u) / u^3
        y = y * z - 5.376870470e-02f;
        y = y * z + 1.333168896e-01f;
        y = y * z - 3.333328326e-01f;
        const float half = 0.5f * (u + u * z * y);
        if (u < 0.6f) below = 0.5f - half, above = 0.5f + half;
      }
    }
  };
};

template <class T>
struct ExactForm {
  static __device__ __forceinline__ float value(float x) {
    if constexpr (std::is_same_v<T, float>) return x * normcdff(x);
    const float a = distance(x);
    return x * phi(x, a, density(a));
  }

  static __device__ __forceinline__ ValueAndSlope both(float x) {
    constexpr float kDensity = 0.398942280401432678f;  // 1 / sqrt(2 pi)
    const float a = distance(x), e = density(a), s = phi(x, a, e);
    return {x * s, s + x * (e * kDensity)};
  }

 private:
  static __device__ __forceinline__ float density(float a) { return ptx::exp2(a * a * (-kLog2e / 2)); }

  static __device__ __forceinline__ float phi(float x, float a, float e) {
    if constexpr (std::is_same_v<T, float>) return normcdff(x);
    const float t = ptx::reciprocal(a * 0.375f + 1.0f);
    float r = t * 4.787952081e-02f - 1.627343400e-01f;
    r = r * t + 1.268195659e-01f;
    r = r * t + 5.538708717e-02f;
    r = r * t + 1.338399202e-01f;
    r = r * t + 1.491955072e-01f;
    r = r * t + 1.496128440e-01f;
    const float below = e * (t * r);
    return x < 0.0f ? below : 1.0f - below;
  }
};

}  // namespace torchweld::cuda::activation
