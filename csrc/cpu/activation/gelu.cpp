// GELU by its tanh approximation, written with the logistic function that it equals:
//
//   u = 2 * sqrt(2 / pi) * (x + 0.044715 x^3)      s = 1 / (1 + exp(-u))
//   y = x * s                                      dx = dy * (s + x * s * (1 - s) * du/dx)
//
// One value read and one written forward, two and one backward; one exponential and one division an element.
// Hendrycks, Gimpel: Gaussian Error Linear Units, arXiv:1606.08415.

#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/vec.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kChunk = 4096;  // elements in a unit of work, so that chunks start on a vector's alignment
constexpr int64_t kChunksPerThread = 4;
constexpr float kSlope = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;

// The bound keeps exp2 in its range; written so that a NaN passes.
TW_INLINE Vec exp_minus(Vec u) { return exp2<6>(vmin(splat(126.0f), u * -kLog2e)); }

// f(begin, end) over the elements, in whole chunks.
template <class F>
void for_chunks(int64_t numel, F&& f) {
  parallel_for((numel + kChunk - 1) / kChunk, kChunksPerThread,
               [&](int64_t first, int64_t last) { f(first * kChunk, last * kChunk < numel ? last * kChunk : numel); });
}

}  // namespace

namespace TORCHWELD_ISA {

void gelu_forward(const GeluForwardParams& p) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* input = static_cast<const T*>(p.input);
    T* output = static_cast<T*>(p.output);
    for_chunks(p.numel, [&](int64_t begin, int64_t end) {
      for_each_vector(end - begin, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const Vec x = load(input + begin + i, lanes);
        const Vec u = x * (x * x * (kSlope * kCubic) + kSlope);
        store(output + begin + i, x / (1.0f + exp_minus(u)), lanes);
      });
    });
  });
}

void gelu_backward(const GeluBackwardParams& p) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *doutput = static_cast<const T*>(p.doutput), *input = static_cast<const T*>(p.input);
    T* dinput = static_cast<T*>(p.dinput);
    for_chunks(p.numel, [&](int64_t begin, int64_t end) {
      for_each_vector(end - begin, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        // Far out s is 0 or 1 to the last bit, and x^3 must not reach infinity: 0 * inf is NaN.
        const Vec x = vmax(splat(-1e4f), vmin(splat(1e4f), load(input + begin + i, lanes))), square = x * x;
        const Vec e = exp_minus(x * (square * (kSlope * kCubic) + kSlope));
        const Vec s = 1.0f / (1.0f + e), rest = e * s;  // 1 - s, without its cancellation
        const Vec slope = square * (3 * kSlope * kCubic) + kSlope;
        store(dinput + begin + i, load(doutput + begin + i, lanes) * (s + x * s * rest * slope), lanes);
      });
    });
  });
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
