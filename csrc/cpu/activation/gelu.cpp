// GELU, y = x * Phi(x) and dx = dy * (Phi(x) + x * Phi'(x)), with a = |x| and Phi(-a) in one of two forms:
//
//   tanh    e = exp(-2 sqrt(2 / pi) (a + 0.044715 a^3))     Phi(-a) = e / (1 + e), Phi(a) = 1 / (1 + e)
//   exact   e = exp(-a^2 / 2)                               Phi(-a) = e * (1 / 2 - a t P(t)), t = 1 / (1 + a / 4)
//
// The exact form has Phi(a) = 1 - Phi(-a). Nothing overflows and nothing cancels. P is a polynomial, fitted on
// [0, 14.5] for a relative error of Phi(-a) of 1.7e-8. The forward reads one value and writes one, the backward reads
// two and writes one. Each element takes one exponential and one division. Hendrycks, Gimpel: Gaussian Error Linear
// Units, arXiv:1606.08415.

#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/vec.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kChunk = 4096;  // elements of a unit of work; chunks start at a vector's alignment
constexpr int64_t kChunksPerThread = 4;
constexpr double kLog2eExact = 1.44269504088896341;

TW_INLINE VecI negative(Vec x) { return (VecI)x < 0; }  // -0 as well, for which either side will do
TW_INLINE Vec magnitude(Vec x) { return from_bits(bits(x) & 0x7fffffffu); }

// |x|, at most 16: above that e is 0, and its factors must be finite. Only an infinite x then gives NaN, by x * 0.
TW_INLINE Vec distance(Vec x) { return vmin(splat(16.0f), magnitude(x)); }

struct TanhForm {
  static constexpr double kSlope = 1.5957691216057308, kCubic = 0.044715;  // 2 sqrt(2 / pi)

  TW_INLINE static Vec exponential(Vec a) {
    constexpr auto first = static_cast<float>(-kLog2eExact * kSlope), third = static_cast<float>(first * kCubic);
    return exp2<6>(a * (a * a * third + first));
  }

  TW_INLINE static Vec value(Vec x) {
    const Vec e = exponential(magnitude(x));
    return (negative(x) ? x * e : x) / (1.0f + e);
  }

  TW_INLINE static Vec slope(Vec x) {
    const Vec a = distance(x), e = exponential(a), above = 1.0f / (1.0f + e), below = e * above;
    const Vec inner = a * a * static_cast<float>(3 * kSlope * kCubic) + static_cast<float>(kSlope);
    return (negative(x) ? below : above) + x * (below * above * inner);
  }
};

struct ExactForm {
  TW_INLINE static Vec value(Vec x) {
    const Vec a = distance(x), below = phi_below(a, density(a));
    return x * (negative(x) ? below : 1.0f - below);
  }

  TW_INLINE static Vec slope(Vec x) {
    constexpr float kDensity = 0.398942280401432678f;  // 1 / sqrt(2 pi)
    const Vec a = distance(x), e = density(a), below = phi_below(a, e);
    return (negative(x) ? below : 1.0f - below) + x * (e * kDensity);
  }

 private:
  TW_INLINE static Vec density(Vec a) { return exp2<6>(a * a * static_cast<float>(-kLog2eExact / 2)); }

  TW_INLINE static Vec phi_below(Vec a, Vec e) {
    const Vec t = 1.0f / (a * 0.25f + 1.0f);
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
void dispatch_gelu(DType dtype, bool exact, F&& f) {
  dispatch(dtype, [&](auto tag) { exact ? f(tag, Tag<ExactForm>{}) : f(tag, Tag<TanhForm>{}); });
}

// f(begin, end) over the elements, in whole chunks.
template <class F>
void for_chunks(int64_t numel, F&& f) {
  parallel_for((numel + kChunk - 1) / kChunk, kChunksPerThread,
               [&](int64_t first, int64_t last) { f(first * kChunk, last * kChunk < numel ? last * kChunk : numel); });
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void gelu_forward(const GeluForwardParams& p) {
  dispatch_gelu(p.dtype, p.exact, [&](auto tag, auto form) {
    using T = typename decltype(tag)::type;
    using Form = typename decltype(form)::type;
    const T* input = static_cast<const T*>(p.input);
    T* output = static_cast<T*>(p.output);
    for_chunks(p.numel, [&](int64_t begin, int64_t end) {
      for_each_value(
          end - begin,
          [&](int64_t i, auto lanes)
              __attribute__((always_inline)) { return Form::value(load(input + begin + i, lanes)); },
          [&](int64_t i, auto y, auto lanes) __attribute__((always_inline)) { store(output + begin + i, y, lanes); });
    });
  });
}

void gelu_backward(const GeluBackwardParams& p) {
  dispatch_gelu(p.dtype, p.exact, [&](auto tag, auto form) {
    using T = typename decltype(tag)::type;
    using Form = typename decltype(form)::type;
    const T *doutput = static_cast<const T*>(p.doutput), *input = static_cast<const T*>(p.input);
    T* dinput = static_cast<T*>(p.dinput);
    for_chunks(p.numel, [&](int64_t begin, int64_t end) {
      for_each_value(
          end - begin,
          [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            return load(doutput + begin + i, lanes) * Form::slope(load(input + begin + i, lanes));
          },
          [&](int64_t i, auto dx, auto lanes) __attribute__((always_inline)) { store(dinput + begin + i, dx, lanes); });
    });
  });
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
