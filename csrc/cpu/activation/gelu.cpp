// GELU, exact or by the tanh approximation, forward and backward: the forms of forms.h. One value read and one written
// forward, two and one backward.

#include "cpu/activation/forms.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kChunk = 4096;  // elements of a unit of work; chunks start at a vector's alignment
constexpr int64_t kChunksPerThread = 4;

// f(Tag<T>, Tag<form>).
template <class F>
void dispatch_gelu(DType dtype, bool exact, F&& f) {
  dispatch(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    exact ? f(tag, Tag<ExactForm<T>>{}) : f(tag, Tag<TanhForm<T>>{});
  });
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
            return load(doutput + begin + i, lanes) * Form::both(load(input + begin + i, lanes)).slope;
          },
          [&](int64_t i, auto dx, auto lanes) __attribute__((always_inline)) { store(dinput + begin + i, dx, lanes); });
    });
  });
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
