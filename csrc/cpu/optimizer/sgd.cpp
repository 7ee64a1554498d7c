// Stochastic gradient descent, one step over a list of tensors.
//
//   g = sign * clip * grad / grad_scale + weight_decay * p
//   b = momentum * b + (1 - dampening) * g         (first step: momentum * 0 + g)
//   p = p - lr * (b, or g + momentum * b for Nesterov's, or g without momentum)
//
// Bytes per fp32 parameter: 12, with momentum 20.
// Polyak 1964; Sutskever, Martens, Dahl, Hinton: On the importance of initialization and momentum, ICML 2013.

#include "cpu/isa/kernels.h"
#include "cpu/optimizer/optimizer.h"

namespace torchweld::cpu {
namespace {

struct SgdRule {
  float lr, weight_decay, momentum, gain;
  bool nesterov;

  template <class ST>
  TW_INLINE void fetch(const OptimizerTensor& t, int64_t i) const {
    if (t.state[0] != nullptr) prefetch(at<ST>(t.state[0], i));
  }

  template <class ST, class Lanes>
  TW_INLINE Vec operator()(const OptimizerTensor& t, Vec p, Vec g, int64_t i, Lanes lanes) const {
    if (weight_decay != 0) g = fused(splat(weight_decay), p, g);
    if (t.state[0] != nullptr) {
      ST* buffer = at<ST>(t.state[0], i);
      const Vec b = momentum * load(buffer, lanes) + gain * g;
      store(buffer, b, lanes);
      g = nesterov ? g + momentum * b : b;
    }
    return p - lr * g;
  }
};

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void sgd(const SgdParams& p) {
  if (overflowed(p)) return;
  step(p,
       SgdRule{static_cast<float>(learning_rate(p)), static_cast<float>(p.weight_decay), static_cast<float>(p.momentum),
               p.first_step ? 1.0f : static_cast<float>(1 - p.dampening), p.nesterov});
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
