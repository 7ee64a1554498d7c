// Gated activations, y = f(gate) * up, and
//
//   dgate = dy * up * f'(gate)      dup = dy * f(gate)
//
// with f one of forms.cuh: SwiGLU by silu, GeGLU by GELU. f(gate) is never stored: two values read and one written
// forward, three and two backward. Rows may be a part of longer ones, as are both halves of one packed tensor; rows
// that lie beside each other are worked on as one. Shazeer: GLU Variants Improve Transformer, arXiv:2002.05202.
//
// Grid -> (tiles of a row, groups of blockDim.y rows). A thread owns kVectors vectors of 16 bytes in a row, blockDim.x
// apart, and loads all of them before it computes. Where a tensor or a row of it does not begin on 16 bytes, a vector
// is one element.

#include <algorithm>

#include "cuda/activation/forms.cuh"
#include "cuda/kernels.h"

namespace torchweld::cuda::activation {
namespace {

constexpr int kThreads = 256, kVectors = 2;
constexpr int64_t kMostGroups = 4096;  // of a grid: more than are on a GPU at a time, and a block goes on to the next

// A matrix. The stride is the distance of its rows, in elements.
template <class Memory>
struct Rows {
  Memory* data;
  int64_t stride;
};

// The values of one element in L outputs.
template <int L>
struct Element {
  float values[L];
};

// outputs[l][first + i] = f(x, i).values[l], where x are vectors of the inputs.
template <class T, int V, int K, int L, class F>
__device__ __forceinline__ void store_results(const Vector<T, V> (&x)[K], const Rows<void> (&outputs)[L], int64_t row,
                                              int64_t first, F&& f) {
  float results[L][V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const Element<L> element = f(x, i);
#pragma unroll
    for (int l = 0; l < L; ++l) results[l][i] = element.values[l];
  }
#pragma unroll
  for (int l = 0; l < L; ++l) {
    Vector<T, V> y;
    y.set([&](int i) { return results[l][i]; });
    y.store(at<T>(outputs[l].data, row * outputs[l].stride + first));
  }
}

// f over the elements of K inputs of [rows, cols], in vectors of V. Only a single row may have elements after its last
// vector; they are the last block's.
template <class T, int V, int K, int L, class F>
__device__ __forceinline__ void map_rows(int64_t rows, int64_t cols, const Rows<const void> (&inputs)[K],
                                         const Rows<void> (&outputs)[L], F&& f) {
  const int lanes = static_cast<int>(blockDim.x);
  const int64_t vectors = cols / V, first = blockIdx.x * int64_t{kVectors} * lanes + threadIdx.x;
  for (int64_t row = blockIdx.y * int64_t{blockDim.y} + threadIdx.y; row < rows;
       row += int64_t{gridDim.y} * blockDim.y) {
    // Load.
    Vector<T, V> x[kVectors][K];
#pragma unroll
    for (int c = 0; c < kVectors; ++c)
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (first + c * lanes < vectors)
          x[c][k].load_once(at<T>(inputs[k].data, row * inputs[k].stride + (first + c * lanes) * V));

    // Compute, store.
#pragma unroll
    for (int c = 0; c < kVectors; ++c)
      if (first + c * lanes < vectors) store_results(x[c], outputs, row, (first + c * lanes) * V, f);
    if constexpr (V > 1) {
      if (blockIdx.x + 1 < gridDim.x) continue;
#pragma unroll 1
      for (int64_t i = vectors * V + threadIdx.x; i < cols; i += lanes) {
        Vector<T, 1> single[K];
#pragma unroll
        for (int k = 0; k < K; ++k) single[k].load_once(at<T>(inputs[k].data, row * inputs[k].stride + i));
        store_results(single, outputs, row, i, f);
      }
    }
  }
}

template <class T, class Form, int V>
__global__ void __launch_bounds__(kThreads) forward_rows(const __grid_constant__ GatedForwardParams p) {
  map_rows<T, V, 2, 1>(p.rows, p.cols, {{p.gate, p.gate_stride}, {p.up, p.up_stride}}, {{p.output, p.cols}},
                       [](const auto& x, int i) { return Element<1>{Form::value(x[0][i]) * x[1][i]}; });
}

template <class T, class Form, int V>
__global__ void __launch_bounds__(kThreads) backward_rows(const __grid_constant__ GatedBackwardParams p) {
  map_rows<T, V, 3, 2>(p.rows, p.cols, {{p.doutput, p.cols}, {p.gate, p.gate_stride}, {p.up, p.up_stride}},
                       {{p.dgate, p.dgate_stride}, {p.dup, p.dup_stride}}, [](const auto& x, int i) {
                         const ValueAndSlope form = Form::both(x[1][i]);
                         return Element<2>{x[0][i] * x[2][i] * form.slope, x[0][i] * form.value};
                       });
}

// f(Tag<T>, Tag<form>).
template <class F>
void dispatch_activation(const char* name, DType dtype, Activation activation, F&& f) {
  dispatch(name, dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    switch (activation) {
      case Activation::silu:
        return f(t, Tag<SiluForm<T>>{});
      case Activation::gelu:
        return f(t, Tag<ExactForm<T>>{});
      case Activation::gelu_tanh:
        return f(t, Tag<TanhForm<T>>{});
    }
  });
}

// Makes one row of all, if they lie beside each other in every tensor.
template <class Params, class... Strides>
void flatten(Params& p, Strides... strides) {
  if (((strides != p.cols) || ...)) return;
  p.cols *= p.rows;
  p.rows = 1;
}

// Whether every row of 16-byte vectors begins at a multiple of 16 bytes, if the tensors do.
template <class Params, class... Strides>
bool rows_of_vectors(const Params& p, int width, Strides... strides) {
  return p.rows == 1 || ((p.cols % width == 0) && ... && (strides % width == 0));
}

template <class Params>
void launch_rows(const char* name, void (*kernel)(Params), int width, const std::remove_const_t<Params>& p,
                 Stream stream) {
  const int64_t vectors = (p.cols + width - 1) / width, tile = int64_t{kVectors} * kThreads;
  const int64_t tiles = (vectors + tile - 1) / tile;
  const int lanes = std::min(lanes_for((vectors + tiles - 1) / tiles, kVectors), kThreads);
  const dim3 block(static_cast<unsigned>(lanes),
                   static_cast<unsigned>(std::min<int64_t>(std::max(1, kThreads / lanes), p.rows)));
  dim3 grid = grid_of(name, (vectors + int64_t{kVectors} * lanes - 1) / (int64_t{kVectors} * lanes));
  grid.y = static_cast<unsigned>(std::min((p.rows + block.y - 1) / block.y, kMostGroups));
  launch(name, kernel, grid, block, 0, stream, p);
}

}  // namespace
}  // namespace torchweld::cuda::activation

namespace torchweld::cuda {

void gated_forward(const GatedForwardParams& params, Stream stream) {
  using namespace activation;
  if (params.rows == 0 || params.cols == 0) return;
  GatedForwardParams p = params;
  flatten(p, p.gate_stride, p.up_stride);
  dispatch_activation("gated_forward", p.dtype, p.activation, [&](auto t, auto form) {
    using T = typename decltype(t)::type;
    using Form = typename decltype(form)::type;
    constexpr int V = 16 / sizeof(T);
    const bool vectorized = aligned16(p.gate, p.up, p.output) && rows_of_vectors(p, V, p.gate_stride, p.up_stride);
    launch_rows("gated_forward", vectorized ? forward_rows<T, Form, V> : forward_rows<T, Form, 1>, vectorized ? V : 1,
                p, stream);
  });
}

void gated_backward(const GatedBackwardParams& params, Stream stream) {
  using namespace activation;
  if (params.rows == 0 || params.cols == 0) return;
  GatedBackwardParams p = params;
  flatten(p, p.gate_stride, p.up_stride, p.dgate_stride, p.dup_stride);
  dispatch_activation("gated_backward", p.dtype, p.activation, [&](auto t, auto form) {
    using T = typename decltype(t)::type;
    using Form = typename decltype(form)::type;
    constexpr int V = 16 / sizeof(T);
    const bool vectorized = aligned16(p.doutput, p.gate, p.up, p.dgate, p.dup) &&
                            rows_of_vectors(p, V, p.gate_stride, p.up_stride, p.dgate_stride, p.dup_stride);
    launch_rows("gated_backward", vectorized ? backward_rows<T, Form, V> : backward_rows<T, Form, 1>,
                vectorized ? V : 1, p, stream);
  });
}

}  // namespace torchweld::cuda
