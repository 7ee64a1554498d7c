// AdamW and Adam, one step over a list of tensors; the formula is in cpu/optimizer/adamw.cpp, the launches are in
// optimizer.cuh. Bytes per parameter: 28 in fp32 (read p, g, m, v; write p, m, v), 14 all in 16 bits, 22 for 16-bit
// parameters and gradients with fp32 state, 30 with an fp32 master; in 16-byte packets. Loshchilov, Hutter:
// arXiv:1711.05101. Kingma, Ba: arXiv:1412.6980.

#include "cuda/kernels.h"
#include "cuda/optimizer/optimizer.cuh"

namespace torchweld::cuda {
namespace {

struct AdamWRule {
  static constexpr bool kCountsSteps = true;
  float gain1, keep2, gain2, eps, l2;

  template <class ST, int V>
  struct State {
    Run<ST, V> exp_avg, exp_avg_sq, largest;
    float m[V], v[V], top[V];

    __device__ __forceinline__ void load(const OptimizerTensor& t, int64_t i) {
      exp_avg.load_once(at<ST>(t.state[0], i));
      exp_avg_sq.load_once(at<ST>(t.state[1], i));
      if (t.state[2] != nullptr)
        largest.load_once(at<ST>(t.state[2], i));
      else
        largest.set([](int) { return 0.0f; });
    }

    __device__ __forceinline__ void store(const OptimizerTensor& t, int64_t i) {
      exp_avg.set([&](int k) { return m[k]; });
      exp_avg_sq.set([&](int k) { return v[k]; });
      exp_avg.store(at<ST>(t.state[0], i));
      exp_avg_sq.store(at<ST>(t.state[1], i));
      if (t.state[2] == nullptr) return;
      largest.set([&](int k) { return top[k]; });
      largest.store(at<ST>(t.state[2], i));
    }
  };

  // p becomes the new parameter. Each rounding is named: an element has the same bits in a packet and in a tail, where
  // the compiler would fuse other products with other sums.
  template <class State>
  __device__ __forceinline__ void operator()(const OptimizerTensor& t, float& p, float g, State& state, int k) const {
    if (l2 != 0.0f) g = __fmaf_rn(l2, p, g);
    const float m = __fmaf_rn(gain1, g, __fmaf_rn(-gain1, state.exp_avg[k], state.exp_avg[k]));
    const float v = __fmaf_rn(__fmul_rn(gain2, g), g, __fmul_rn(keep2, state.exp_avg_sq[k]));
    const float top = state.largest[k] > v ? state.largest[k] : v;  // NaN in v stays
    p = __fmaf_rn(t.decay, p, -__fmul_rn(t.step_size, m) / __fmaf_rn(sqrtf(top), t.inv_sqrt_bias2, eps));
    state.m[k] = m, state.v[k] = v, state.top[k] = top;
  }
};

}  // namespace

void adamw(const AdamWParams& p, Stream stream) {
  const Counting counting{p.lr, p.beta1, p.beta2, p.decoupled ? p.weight_decay : 0.0, p.lr_tensor, p.found_inf};
  fill_table("adamw_", p.tensors, p.count, counting, p.table, stream);
  const AdamWRule rule{static_cast<float>(1 - p.beta1), static_cast<float>(p.beta2), static_cast<float>(1 - p.beta2),
                       static_cast<float>(p.eps), p.decoupled ? 0.0f : static_cast<float>(p.weight_decay)};
  launch_step("adamw_", p, rule, stream);
}

}  // namespace torchweld::cuda
