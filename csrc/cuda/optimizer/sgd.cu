// Stochastic gradient descent, one step over a list of tensors. The formula is in cpu/optimizer/sgd.cpp, the launches
// are in optimizer.cuh. Bytes per fp32 parameter: 12, with momentum 20.

#include "cuda/kernels.h"
#include "cuda/optimizer/optimizer.cuh"

namespace torchweld::cuda::optimizer {
namespace {

struct SgdRule {
  static constexpr bool kCountsSteps = false;  // so there is no stochastic rounding
  float weight_decay, momentum, one_minus_dampening;
  bool nesterov;

  template <class ST, int V>
  struct State {
    Vector<ST, V> buffer;
    float b[V];

    __device__ __forceinline__ void load(const OptimizerTensor& t, int64_t i) {
      if (t.state[0] != nullptr) buffer.load_once(at<ST>(t.state[0], i));
    }

    __device__ __forceinline__ void store(const OptimizerTensor& t, int64_t i) {
      if (t.state[0] == nullptr) return;
      buffer.set([&](int k) { return b[k]; });
      buffer.store(at<ST>(t.state[0], i));
    }
  };

  // p becomes the new parameter. Each rounding is explicit, as in adamw.cu.
  template <class State>
  __device__ __forceinline__ void operator()(const OptimizerTensor& t, float& p, float g, State& state, int k) const {
    if (weight_decay != 0.0f) g = __fmaf_rn(weight_decay, p, g);
    if (t.state[0] != nullptr) {
      state.b[k] = __fmaf_rn(momentum, state.buffer[k], __fmul_rn(one_minus_dampening, g));
      g = nesterov ? __fmaf_rn(momentum, state.b[k], g) : state.b[k];
    }
    p = __fmaf_rn(-t.step_size, g, p);
  }
};

}  // namespace
}  // namespace torchweld::cuda::optimizer

namespace torchweld::cuda {

void sgd(const SgdParams& p, Stream stream) {
  using namespace optimizer;
  fill_table("sgd_", p.tensors, p.count, StepSizes{p.lr, 0, 0, 0, p.lr_tensor, p.found_inf}, p.table, stream);
  const SgdRule rule{static_cast<float>(p.weight_decay), static_cast<float>(p.momentum),
                     p.first_step ? 1.0f : static_cast<float>(1 - p.dampening), p.nesterov};
  launch_step("sgd_", p, rule, stream);
}

}  // namespace torchweld::cuda
