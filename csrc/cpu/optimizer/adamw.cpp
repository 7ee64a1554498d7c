// AdamW and Adam, one step over a list of tensors.
//
//   g = sign * clip * grad / grad_scale            (+ weight_decay * p as Adam's L2 term)
//   m = m + (1 - beta1) * (g - m)                  v = beta2 * v + (1 - beta2) * g^2
//   p = decay * p - step_size * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   decay = 1 - lr * weight_decay (AdamW) or 1     step_size = lr / (1 - beta1^t)
//   sign = -1 to maximize                          clip = min(1, max_grad_norm / (norm + 1e-6))
//   AMSGrad uses the largest v so far in place of v.
//
// One read of p, g, m, v and one write of p, m, v. Bytes per parameter: 28 in fp32; bf16 parameters and gradients with
// fp32 state 22, with an fp32 master 30. Writes of gradients (unscaled, or zeros) and AMSGrad add to this.
// Loshchilov, Hutter: arXiv:1711.05101. Kingma, Ba: arXiv:1412.6980. AMSGrad: Reddi, Kale, Kumar: arXiv:1904.09237.

#include "cpu/isa/kernels.h"
#include "cpu/optimizer/optimizer.h"

namespace torchweld::cpu {
namespace {

// Root and quotient to an ulp. A core's divider takes some 35 cycles for both of 16 floats. Memory takes as long for a
// whole step in 16 bits. Approximations of 14 bits and one step of Newton's method take a quarter of that.
TW_INLINE Vec root(Vec v) {
#if defined(__AVX512F__)
  constexpr int kZeroOrInfinite = 0x0e;
  const Vec y = (Vec)_mm512_rsqrt14_ps((__m512)v), s = v * y;
  const Vec refined = s + 0.5f * y * (v - s * s);
  return (Vec)_mm512_mask_mov_ps((__m512)refined, _mm512_fpclass_ps_mask((__m512)v, kZeroOrInfinite), (__m512)v);
#else
  return vsqrt(v);
#endif
}

TW_INLINE Vec quotient(Vec a, Vec b) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)b), error = 1.0f - b * r;
  return a * (error == error ? r + r * error : r);  // the reciprocals of 0 and infinity are exact
#else
  return a / b;
#endif
}

// Stores to two arrays. In bfloat16 one instruction rounds both vectors.
template <class ST, class Lanes>
TW_INLINE void store_both(ST* p, Vec first, ST* q, Vec second, Lanes lanes) {
  store(p, first, lanes);
  store(q, second, lanes);
}
#if defined(__SSE2__)
template <class Lanes>
TW_INLINE void store_both(bf16* p, Vec first, bf16* q, Vec second, Lanes lanes) {
  VecH halves[2];
  const VecHH both = narrow_bf16(Pair{first, second});
  std::memcpy(halves, &both, sizeof both);
  store_bits(p, halves[0], lanes);
  store_bits(q, halves[1], lanes);
}
#endif

struct AdamWRule {
  // The mean goes from the nearer of m and g towards the other, as in torch's lerp: only the smaller term adds a
  // rounding, and beta1 = 0 gives the gradient itself.
  bool from_mean;
  float towards;  // 1 - beta1, or -beta1 from the gradient
  float keep2, gain2, eps, l2;

  template <class ST>
  TW_INLINE void fetch(const OptimizerTensor& t, int64_t i) const {
    prefetch(at<ST>(t.state[0], i));
    prefetch(at<ST>(t.state[1], i));
  }

  template <class ST, class Lanes>
  TW_INLINE Vec operator()(const OptimizerTensor& t, Vec p, Vec g, int64_t i, Lanes lanes) const {
    ST *exp_avg = at<ST>(t.state[0], i), *exp_avg_sq = at<ST>(t.state[1], i);
    if (l2 != 0) g = fused(splat(l2), p, g);
    Vec m = load(exp_avg, lanes), v = load(exp_avg_sq, lanes);
    m = (from_mean ? m : g) + towards * (g - m);
    v = keep2 * v + gain2 * g * g;
    store_both(exp_avg, m, exp_avg_sq, v, lanes);
    if (t.state[2] != nullptr) {
      ST* largest = at<ST>(t.state[2], i);
      v = vmax(load(largest, lanes), v);
      store(largest, v, lanes);
    }
    return t.decay * p - t.step_size * quotient(m, root(v) * t.inv_sqrt_bias2 + eps);
  }
};

// Counts the step of every tensor. Most lists have equal steps, so the powers are computed once.
void advance(const AdamWParams& p) {
  const double lr = learning_rate(p);
  const float decay = p.decoupled ? static_cast<float>(1 - lr * p.weight_decay) : 1.0f;
  float known = 0, step_size = 0, inv_sqrt_bias2 = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    OptimizerTensor& t = p.tensors[i];
    const float step = *t.step += 1;
    if (step != known) {
      known = step;
      step_size = static_cast<float>(lr / (1 - __builtin_pow(p.beta1, step)));
      inv_sqrt_bias2 = static_cast<float>(1 / __builtin_sqrt(1 - __builtin_pow(p.beta2, step)));
    }
    t.step_size = step_size;
    t.inv_sqrt_bias2 = inv_sqrt_bias2;
    t.decay = decay;
  }
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void adamw(const AdamWParams& p) {
  if (overflowed(p)) return;
  advance(p);
  const float gain1 = static_cast<float>(1 - p.beta1), keep2 = static_cast<float>(p.beta2),
              gain2 = static_cast<float>(1 - p.beta2), eps = static_cast<float>(p.eps),
              l2 = p.decoupled ? 0.0f : static_cast<float>(p.weight_decay);
  const bool from_mean = gain1 < 0.5f;
  step(p, AdamWRule{from_mean, from_mean ? gain1 : gain1 - 1.0f, keep2, gain2, eps, l2});
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
