// AdamW and Adam, one step over a list of tensors. The formula is in cpu/optimizer/adamw.cpp, the launches are in
// optimizer.cuh. Bytes per parameter: 28 in fp32 (read p, g, m, v; write p, m, v), 14 all in 16 bits, 22 for 16-bit
// parameters and gradients with fp32 state, 30 with an fp32 master. Loshchilov, Hutter: arXiv:1711.05101. Kingma, Ba:
// arXiv:1412.6980.

#include "cuda/kernels.h"
#include "cuda/optimizer/optimizer.cuh"

namespace torchweld::cuda::optimizer {
namespace {

struct AdamWRule {
  static constexpr bool kCountsSteps = true;
  float one_minus_beta1, beta2, one_minus_beta2, eps, l2;

  template <class ST, int V>
  struct State {
    Vector<ST, V> exp_avg, exp_avg_sq, max_exp_avg_sq;
    float m[V], v[V], top[V];

    __device__ __forceinline__ void load(const OptimizerTensor& t, int64_t i) {
      exp_avg.load_once(at<ST>(t.state[0], i));
      exp_avg_sq.load_once(at<ST>(t.state[1], i));
      if (t.state[2] != nullptr)
        max_exp_avg_sq.load_once(at<ST>(t.state[2], i));
      else
        max_exp_avg_sq.set([](int) { return 0.0f; });
    }

    __device__ __forceinline__ void store(const OptimizerTensor& t, int64_t i) {
      exp_avg.set([&](int k) { return m[k]; });
      exp_avg_sq.set([&](int k) { return v[k]; });
      exp_avg.store(at<ST>(t.state[0], i));
      exp_avg_sq.store(at<ST>(t.state[1], i));
      if (t.state[2] == nullptr) return;
      max_exp_avg_sq.set([&](int k) { return top[k]; });
      max_exp_avg_sq.store(at<ST>(t.state[2], i));
    }
  };

  // p becomes the new parameter. Each rounding is explicit, so that an element has the same bits in a vector and in a
  // tail, where the compiler would fuse different products with sums.
  template <class State>
  __device__ __forceinline__ void operator()(const OptimizerTensor& t, float& p, float g, State& state, int k) const {
    if (l2 != 0.0f) g = __fmaf_rn(l2, p, g);
    // From the nearer end, as torch's lerp: exactly g where beta1 is 0.
    const bool from_mean = one_minus_beta1 < 0.5f;
    const float from = from_mean ? state.exp_avg[k] : g, gain = from_mean ? one_minus_beta1 : one_minus_beta1 - 1.0f;
    const float m = __fmaf_rn(gain, __fsub_rn(g, state.exp_avg[k]), from);
    const float v = __fmaf_rn(__fmul_rn(one_minus_beta2, g), g, __fmul_rn(beta2, state.exp_avg_sq[k]));
    const float top = state.max_exp_avg_sq[k] > v ? state.max_exp_avg_sq[k] : v;  // NaN in v stays
    p = __fmaf_rn(t.decay, p, -__fmul_rn(t.step_size, m) / __fmaf_rn(sqrtf(top), t.inv_sqrt_bias2, eps));
    state.m[k] = m, state.v[k] = v, state.top[k] = top;
  }
};

}  // namespace
}  // namespace torchweld::cuda::optimizer

namespace torchweld::cuda {

void adamw(const AdamWParams& p, Stream stream) {
  using namespace optimizer;
  const StepSizes step_sizes{p.lr, p.beta1, p.beta2, p.decoupled ? p.weight_decay : 0.0, p.lr_tensor, p.found_inf};
  fill_table("adamw_", p.tensors, p.count, step_sizes, p.table, stream);
  const AdamWRule rule{static_cast<float>(1 - p.beta1), static_cast<float>(p.beta2), static_cast<float>(1 - p.beta2),
                       static_cast<float>(p.eps), p.decoupled ? 0.0f : static_cast<float>(p.weight_decay)};
  launch_step("adamw_", p, rule, stream);
}

}  // namespace torchweld::cuda
