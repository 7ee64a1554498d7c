// Cross-entropy of class indices, by row of V logits:
//
//   z = logits - max        loss = (1 - s) * (log(sum(exp(z))) - z[target]) + s * (log(sum(exp(z))) - mean(z))
//   dlogits = dloss * (exp(z) / sum(exp(z)) - s / V), and dloss * (1 - s) less at the target
//
// with s the label smoothing. A thread owns whole rows. A row stays in cache between the pass for its maximum and the
// pass for its sum. The forward reads the logits once, the backward reads them once and writes them once. The
// probabilities are never stored. log_softmax followed by nll_loss stores them, and moves the matrix eight times.

#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd/exp.h"
#include "cpu/simd/vec.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kLogitsPerThread = 8192;

int64_t rows_per_thread(int64_t classes) { return classes < kLogitsPerThread ? kLogitsPerThread / classes : 1; }

template <class T>
void forward_row(const CrossEntropyForwardParams& p, int64_t m) {
  const int64_t V = p.classes, target = p.target[m];
  const T* x = static_cast<const T*>(p.logits) + m * V;

  // Maximum. A NaN may be lost here, for the sum meets it again.
  Vec largest = splat(-__builtin_inff());
  for_each_vector(V, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    largest = vmax(keep(load(x + i, lanes), lanes, -__builtin_inff()), largest);
  });
  const float max = max_of(largest);

  // Sum.
  const float sum = sum_over(V, [&](int64_t i, auto lanes) { return exp2<6>((load(x + i, lanes) - max) * kLog2e); });
  p.max[m] = max;
  p.sum[m] = sum;

  // Loss.
  if (target == p.ignore_index) {
    p.loss[m] = 0.0f;
    return;
  }
  const float log_sum = __builtin_logf(sum);
  float picked;
  store(&picked, load(x + target, First{1}), First{1});
  float loss = log_sum - (picked - max);
  if (p.smoothing > 0.0f) {
    const float share = 1.0f / static_cast<float>(V);  // divides each term: the sum of all terms may overflow
    const float mean = sum_over(V, [&](int64_t i, auto lanes) { return (load(x + i, lanes) - max) * share; });
    loss = (1.0f - p.smoothing) * loss + p.smoothing * (log_sum - mean);
  }
  p.loss[m] = loss;
}

template <class T>
void backward_row(const CrossEntropyBackwardParams& p, int64_t m, bool streaming) {
  const int64_t V = p.classes, target = p.target[m];
  const T* x = static_cast<const T*>(p.logits) + m * V;
  T* dx = static_cast<T*>(p.dlogits) + m * V;
  if (target == p.ignore_index) {
    const Vec nothing = splat(p.sum[m] * 0.0f);  // NaN if the row has no probabilities, as in torch
    for_each_vector(V, [&](int64_t i, auto lanes) { store_output(dx + i, nothing, lanes, streaming); });
    return;
  }
  // The target probabilities of a class and of the target. With one class it is 1, and the gradient exactly 0.
  const double smoothing = p.smoothing, other = smoothing / static_cast<double>(V);
  const float others = static_cast<float>(other), own = static_cast<float>(1.0 - smoothing + other);
  const float max = p.max[m], dloss = p.dloss[m], inverse = 1.0f / p.sum[m];
  for_each_value(
      V,
      [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const Vec probability = exp2<6>((load(x + i, lanes) - max) * kLog2e) * inverse;
        Vec v = probability - others;
        if (static_cast<uint64_t>(target - i) < static_cast<uint64_t>(W)) v[target - i] = probability[target - i] - own;
        return v * dloss;
      },
      [&](int64_t i, auto v, auto lanes) __attribute__((always_inline)) { store_output(dx + i, v, lanes, streaming); });
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void cross_entropy_forward(const CrossEntropyForwardParams& p) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(p.rows, rows_per_thread(p.classes), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) forward_row<T>(p, m);
    });
  });
}

void cross_entropy_backward(const CrossEntropyBackwardParams& p) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool streaming = past_cache<T>(p.dlogits, p.rows, p.classes);
    parallel_for(p.rows, rows_per_thread(p.classes), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) backward_row<T>(p, m, streaming);
    });
  });
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
