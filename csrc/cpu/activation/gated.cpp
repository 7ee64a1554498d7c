// Gated activations, y = f(gate) * up, and
//
//   dgate = dy * up * f'(gate)      dup = dy * f(gate)
//
// with f one of forms.h: SwiGLU by silu, GeGLU by GELU. f(gate) is never stored: two values read and one written
// forward, three and two backward. Rows may be a part of longer ones, as are both halves of one packed tensor; rows
// that lie beside each other are worked on as one. Shazeer: GLU Variants Improve Transformer, arXiv:2002.05202.

#include "cpu/activation/forms.h"
#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kBlock = 4096;         // columns in a unit of work, so that blocks start on a vector's alignment
constexpr int64_t kPerThread = 1 << 14;  // elements that are worth a thread

struct Gradients {
  Vec gate, up;
};
struct PairOfGradients {
  Pair gate, up;
};
TW_INLINE PairOfGradients beside(Gradients a, Gradients b) { return {{a.gate, b.gate}, {a.up, b.up}}; }

// Rows of so many columns; a stride is the distance of rows.
struct Shape {
  int64_t rows, cols;

  // All rows as one, if they lie beside each other in every tensor.
  template <class... Strides>
  Shape flattened(Strides... stride) const {
    return ((rows == 1 || stride == cols) && ...) ? Shape{1, rows * cols} : *this;
  }
};

// f(row, first column, columns) over blocks of rows.
template <class F>
void for_blocks(Shape shape, F&& f) {
  const int64_t blocks = (shape.cols + kBlock - 1) / kBlock;
  const int64_t block = shape.cols < kBlock ? shape.cols : kBlock;
  parallel_for(shape.rows * blocks, block > 0 ? (kPerThread + block - 1) / block : 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t begin = unit % blocks * kBlock, rest = shape.cols - begin;
      f(unit / blocks, begin, rest < kBlock ? rest : kBlock);
    }
  });
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void gated_forward(const GatedForwardParams& p) {
  dispatch_activation(p.dtype, p.activation, [&](auto tag, auto form) {
    using T = typename decltype(tag)::type;
    using Form = typename decltype(form)::type;
    const Shape shape = Shape{p.rows, p.cols}.flattened(p.gate_stride, p.up_stride);
    for_blocks(shape, [&](int64_t row, int64_t begin, int64_t count) {
      const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride + begin;
      const T* up = static_cast<const T*>(p.up) + row * p.up_stride + begin;
      T* y = static_cast<T*>(p.output) + row * p.cols + begin;
      for_each_value(
          count,
          [&](int64_t i, auto lanes)
              __attribute__((always_inline)) { return Form::value(load(gate + i, lanes)) * load(up + i, lanes); },
          [&](int64_t i, auto v, auto lanes) __attribute__((always_inline)) { store(y + i, v, lanes); });
    });
  });
}

void gated_backward(const GatedBackwardParams& p) {
  dispatch_activation(p.dtype, p.activation, [&](auto tag, auto form) {
    using T = typename decltype(tag)::type;
    using Form = typename decltype(form)::type;
    const Shape shape = Shape{p.rows, p.cols}.flattened(p.gate_stride, p.up_stride, p.dgate_stride, p.dup_stride);
    for_blocks(shape, [&](int64_t row, int64_t begin, int64_t count) {
      const T* dy = static_cast<const T*>(p.doutput) + row * p.cols + begin;
      const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride + begin;
      const T* up = static_cast<const T*>(p.up) + row * p.up_stride + begin;
      T* dgate = static_cast<T*>(p.dgate) + row * p.dgate_stride + begin;
      T* dup = static_cast<T*>(p.dup) + row * p.dup_stride + begin;
      for_each_value(
          count,
          [&](int64_t i, auto lanes) __attribute__((always_inline)) {
            const ValueAndSlope f = Form::both(load(gate + i, lanes));
            const Vec d = load(dy + i, lanes);
            return Gradients{d * load(up + i, lanes) * f.slope, d * f.value};
          },
          [&](int64_t i, auto d, auto lanes) __attribute__((always_inline)) {
            store(dgate + i, d.gate, lanes);
            store(dup + i, d.up, lanes);
          });
    });
  });
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
