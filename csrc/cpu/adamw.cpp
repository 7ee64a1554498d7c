// AdamW and Adam, one step over a list of tensors, and the norm of a list of gradients.
//
//   g = sign * clip * grad / grad_scale            (+ weight_decay * p, when it is Adam's L2 term)
//   m = m + (1 - beta1) * (g - m)                  v = beta2 * v + (1 - beta2) * g^2
//   p = decay * p - step_size * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//   decay = 1 - lr * weight_decay (AdamW) or 1     step_size = lr / (1 - beta1^t)
//   sign = -1 to maximize                          clip = min(1, max_grad_norm / (norm + 1e-6))
//   AMSGrad puts the largest v so far in v's place.
//
// A thread owns one stretch of the list's concatenation, whatever tensors lie in it. Every element is computed on its
// own, so the bits do not depend on where the threads part. One read of p, g, m, v and one write of p, m, v: 28 bytes
// per fp32 parameter; 32 when the gradient is written back unscaled, 8 more for AMSGrad. The norm costs one read of g:
// kGradNormBlocks sums over fixed stretches, added in order, in double.
// Loshchilov, Hutter: arXiv:1711.05101. Kingma, Ba: arXiv:1412.6980. AMSGrad: Reddi, Kale, Kumar: arXiv:1904.09237.

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kElementsPerThread = 32768;  // below this a second thread costs more than it brings

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// f(tensor, begin, end) for the elements of each tensor that lie in chunks [first, last) of the concatenation.
template <class F>
TW_INLINE void for_each_stretch(const AdamWTensor* tensors, int64_t count, int64_t first, int64_t last, F&& f) {
  const int64_t begin = first * kAdamWChunkCpu, end = last * kAdamWChunkCpu;
  int64_t i = 0;
  for (int64_t above = count; above - i > 1;) {
    const int64_t middle = (i + above) / 2;
    (tensors[middle].begin <= begin ? i : above) = middle;
  }
  for (; i < count && tensors[i].begin < end; ++i) {
    const AdamWTensor& t = tensors[i];
    const int64_t from = begin > t.begin ? begin - t.begin : 0, to = smaller(end - t.begin, t.numel);
    if (from < to) f(t, from, to);
  }
}

template <class T>
T* at(void* base, int64_t index) { return static_cast<T*>(base) + index; }

// ---- Step

// What all tensors of a call share.
struct Scalars {
  float unscale, clip;  // clip has the sign of `maximize`
  float gain1, keep2, gain2, eps, l2;
  bool write_grad;
};

Scalars scalars_of(const AdamWParams& p) {
  double clip = 1;
  if (p.grad_norm != nullptr) {
    const double ratio = p.max_grad_norm / (*p.grad_norm + 1e-6);
    clip = ratio >= 1 ? 1 : ratio;  // NaN stays NaN, as in clip_grad_norm_
  }
  Scalars s{};
  s.unscale = p.grad_scale != nullptr ? 1.0f / *p.grad_scale : 1.0f;
  s.clip = static_cast<float>(p.maximize ? -clip : clip);
  s.gain1 = static_cast<float>(1 - p.beta1);
  s.keep2 = static_cast<float>(p.beta2);
  s.gain2 = static_cast<float>(1 - p.beta2);
  s.eps = static_cast<float>(p.eps);
  s.l2 = p.decoupled ? 0.0f : static_cast<float>(p.weight_decay);
  s.write_grad = p.grad_scale != nullptr;
  return s;
}

// Counts the step of every tensor. Most lists have one step for all, so the powers are taken once.
void advance(const AdamWParams& p) {
  const double lr = p.lr_tensor != nullptr ? *p.lr_tensor : p.lr;
  const float decay = p.decoupled ? static_cast<float>(1 - lr * p.weight_decay) : 1.0f;
  float known = 0, step_size = 0, inv_sqrt_bias2 = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    AdamWTensor& t = p.tensors[i];
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

// T: parameter, GT: gradient, ST: running means.
template <class T, class GT, class ST>
void update(const AdamWTensor& t, const Scalars& s, int64_t begin, int64_t end) {
  T* param = at<T>(t.param, begin);
  GT* grad = at<GT>(t.grad, begin);
  ST* exp_avg = at<ST>(t.exp_avg, begin);
  ST* exp_avg_sq = at<ST>(t.exp_avg_sq, begin);
  ST* largest = t.max_exp_avg_sq != nullptr ? at<ST>(t.max_exp_avg_sq, begin) : nullptr;

  for_each_vector(end - begin, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    // Gradient.
    Vec p = load(param + i, lanes), g = load(grad + i, lanes);
    if (s.write_grad) {
      g = g * s.unscale;
      store(grad + i, g, lanes);
    }
    g = g * s.clip;
    if (s.l2 != 0) g = g + s.l2 * p;

    // Running means.
    Vec m = load(exp_avg + i, lanes), v = load(exp_avg_sq + i, lanes);
    m = m + s.gain1 * (g - m);
    v = s.keep2 * v + s.gain2 * g * g;
    store(exp_avg + i, m, lanes);
    store(exp_avg_sq + i, v, lanes);
    if (largest != nullptr) {
      v = vmax(load(largest + i, lanes), v);
      store(largest + i, v, lanes);
    }

    // Parameter.
    store(param + i, t.decay * p - t.step_size * m / (vsqrt(v) * t.inv_sqrt_bias2 + s.eps), lanes);
  });
}

void update(const AdamWTensor& t, const Scalars& s, int64_t begin, int64_t end) {
  dispatch(t.dtype, [&](auto own) {
    auto of = [&](DType dtype, auto&& f) { dtype == t.dtype ? f(own) : f(Tag<float>{}); };
    of(t.grad_dtype, [&](auto grad) {
      of(t.state_dtype, [&](auto state) {
        update<typename decltype(own)::type, typename decltype(grad)::type, typename decltype(state)::type>(t, s, begin, end);
      });
    });
  });
}

// ---- Norm

// Four streams, a quarter of the stretch apart: a core keeps too few lines of one stream in flight (9 GB/s against 13
// on the core that this was measured on). Chains of 64 additions, so that rounding stays small.
template <class GT>
float sum_of_squares(const GT* grad, int64_t n) {
  constexpr int64_t kChain = 64 * W;
  const int64_t quarter = n / (4 * W) * W;
  Vec total{};
  for (int64_t i = 0; i < quarter;) {
    Vec sums[4] = {};
    for (const int64_t end = smaller(i + kChain, quarter); i < end; i += W) {
      for (int k = 0; k < 4; ++k) {
        const Vec g = load(grad + k * quarter + i);
        sums[k] += g * g;
      }
    }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  const GT* rest = grad + 4 * quarter;
  return sum(total) + sum_over(n - 4 * quarter, [&](int64_t i, auto lanes) {
    const Vec g = load(rest + i, lanes);
    return g * g;
  });
}

}  // namespace

namespace TORCHWELD_ISA {

void adamw(const AdamWParams& p) {
  if (p.found_inf != nullptr && *p.found_inf != 0) return;
  const Scalars s = scalars_of(p);
  advance(p);
  parallel_for(p.total / kAdamWChunkCpu, kElementsPerThread / kAdamWChunkCpu, [&](int64_t first, int64_t last) {
    for_each_stretch(p.tensors, p.count, first, last,
                     [&](const AdamWTensor& t, int64_t begin, int64_t end) { update(t, s, begin, end); });
  });
}

void grad_norm(const GradNormParams& p) {
  const int64_t chunks = p.total / kAdamWChunkCpu, blocks = smaller(chunks, kGradNormBlocks);
  const int64_t grain = blocks * kElementsPerThread / (p.total > 0 ? p.total : 1) + 1;
  parallel_for(blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      double squares = 0;
      for_each_stretch(p.tensors, p.count, chunks * b / blocks, chunks * (b + 1) / blocks,
                       [&](const AdamWTensor& t, int64_t begin, int64_t end) {
                         dispatch(t.grad_dtype, [&](auto tag) {
                           squares += sum_of_squares(at<typename decltype(tag)::type>(t.grad, begin), end - begin);
                         });
                       });
      p.partial[b] = squares;
    }
  });
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += p.partial[b];
  *p.norm = static_cast<float>(__builtin_sqrt(total) / (p.grad_scale != nullptr ? __builtin_fabsf(*p.grad_scale) : 1.0f));
}

}  // namespace TORCHWELD_ISA
}  // namespace torchweld::cpu
