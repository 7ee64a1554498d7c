// GELU, exact or by the tanh approximation, forward and backward: the forms of forms.cuh. Grid -> tiles of kTile
// vectors. A thread owns kVectors vectors of 16 bytes, kThreads apart, and loads all of them before it computes. Where
// a tensor does not begin on 16 bytes, a vector is one element. One value read and one written forward, two and one
// backward.

#include "cuda/activation/forms.cuh"
#include "cuda/kernels.h"

namespace torchweld::cuda::activation {
namespace {

constexpr int kThreads = 256, kVectors = 2, kTile = kThreads * kVectors;

// output[i] = f(inputs[0][i], ...) over `numel` elements of T in vectors of V. The last block has the elements after
// the last vector as well.
template <class T, int V, int K, class F>
__device__ __forceinline__ void map(const void* const (&inputs)[K], void* output, int64_t numel, F&& f) {
  const int64_t first = blockIdx.x * int64_t{kTile} + threadIdx.x, vectors = numel / V;

  // Load.
  Vector<T, V> x[kVectors][K];
#pragma unroll
  for (int c = 0; c < kVectors; ++c)
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (first + c * kThreads < vectors) x[c][k].load_once(at<T>(inputs[k], (first + c * kThreads) * V));

  // Compute, store.
#pragma unroll
  for (int c = 0; c < kVectors; ++c) {
    if (first + c * kThreads >= vectors) break;
    Vector<T, V> y;
    y.set([&](int i) { return f(x[c], i); });
    y.store(at<T>(output, (first + c * kThreads) * V));
  }
  if constexpr (V > 1) {
    const int64_t i = vectors * V + threadIdx.x;
    if (blockIdx.x + 1 < gridDim.x || i >= numel) return;
    Vector<T, 1> single[K], y;
#pragma unroll
    for (int k = 0; k < K; ++k) single[k].load_once(at<T>(inputs[k], i));
    y.set([&](int) { return f(single, 0); });
    y.store(at<T>(output, i));
  }
}

template <class T, class Form, int V>
__global__ void __launch_bounds__(kThreads) forward(const __grid_constant__ GeluForwardParams p) {
  map<T, V>({p.input}, p.output, p.numel, [](const auto& x, int i) { return Form::value(x[0][i]); });
}

template <class T, class Form, int V>
__global__ void __launch_bounds__(kThreads) backward(const __grid_constant__ GeluBackwardParams p) {
  map<T, V>({p.doutput, p.input}, p.dinput, p.numel,
            [](const auto& x, int i) { return x[0][i] * Form::both(x[1][i]).slope; });
}

// f(Tag<T>, Tag<form>).
template <class F>
void dispatch_gelu(const char* name, DType dtype, bool exact, F&& f) {
  dispatch(name, dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    exact ? f(t, Tag<ExactForm<T>>{}) : f(t, Tag<TanhForm<T>>{});
  });
}

template <class Params>
void launch_map(const char* name, void (*vectors)(Params), void (*elements)(Params), int width, bool aligned,
                const std::remove_const_t<Params>& p, Stream stream) {
  const int64_t tile = int64_t{kTile} * (aligned ? width : 1);
  launch(name, aligned ? vectors : elements, grid_of(name, (p.numel + tile - 1) / tile), dim3(kThreads), 0, stream, p);
}

}  // namespace
}  // namespace torchweld::cuda::activation

namespace torchweld::cuda {

void gelu_forward(const GeluForwardParams& p, Stream stream) {
  using namespace activation;
  if (p.numel == 0) return;
  dispatch_gelu("gelu_forward", p.dtype, p.exact, [&](auto t, auto form) {
    using T = typename decltype(t)::type;
    using Form = typename decltype(form)::type;
    constexpr int V = 16 / sizeof(T);
    launch_map("gelu_forward", forward<T, Form, V>, forward<T, Form, 1>, V, aligned16(p.input, p.output), p, stream);
  });
}

void gelu_backward(const GeluBackwardParams& p, Stream stream) {
  using namespace activation;
  if (p.numel == 0) return;
  dispatch_gelu("gelu_backward", p.dtype, p.exact, [&](auto t, auto form) {
    using T = typename decltype(t)::type;
    using Form = typename decltype(form)::type;
    constexpr int V = 16 / sizeof(T);
    launch_map("gelu_backward", backward<T, Form, V>, backward<T, Form, 1>, V, aligned16(p.doutput, p.input, p.dinput),
               p, stream);
  });
}

}  // namespace torchweld::cuda
