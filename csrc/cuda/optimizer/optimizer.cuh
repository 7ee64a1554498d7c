// What the steps of all optimizers share.
//
// fill_table   thread -> tensor     takes the rows of the list as kernel arguments and leaves them in device memory
// step         block -> one chunk of kOptimizerChunkCuda elements, found in the table by its position
//
// The rows travel as arguments, so nothing on the host must outlive the call, a CUDA graph keeps them, and no pointer
// can go stale; one launch of fill_table carries kRowsPerLaunch tensors. step is one launch whatever the length of the
// list. lr, the steps, grad_scale, found_inf and the norm are read on the device: the host never waits.
// An optimizer adds a rule: from parameter and gradient to the new parameter, one run of elements at a time.
#pragma once

#include "cuda/common.cuh"
#include "philox.h"

namespace torchweld::cuda {

constexpr int kThreads = 256;

// CUDA 12.1 raised the arguments of a kernel from 4 KB to 32764 bytes.
constexpr int kArgumentBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;
constexpr int kRowsPerLaunch = (kArgumentBytes - 128) / sizeof(OptimizerTensor);

template <class T>
__device__ __forceinline__ T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}

__device__ __forceinline__ bool overflowed(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0.0f;
}

// ---- Table

// What a row's step size is made of, in double: for AdamW with the count of its steps, for SGD the learning rate.
struct Counting {
  double lr, beta1, beta2, weight_decay;
  const float *lr_tensor, *found_inf;
};

struct Rows {
  OptimizerTensor* table;  // where the first of these rows goes
  int count;
  Counting counting;
  OptimizerTensor rows[kRowsPerLaunch];
};
static_assert(sizeof(Rows) <= kArgumentBytes, "the rows of one launch must fit its arguments");

static __global__ void __launch_bounds__(kThreads) fill_rows(const __grid_constant__ Rows p) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= p.count) return;
  OptimizerTensor t = p.rows[i];
  const Counting& c = p.counting;
  const double lr = c.lr_tensor != nullptr ? *c.lr_tensor : c.lr;
  if (t.step == nullptr) {
    t.step_size = static_cast<float>(lr);
  } else if (!overflowed(c.found_inf)) {
    const float step = *t.step + 1.0f;
    *t.step = step;
    t.step_size = static_cast<float>(lr / (1.0 - pow(c.beta1, static_cast<double>(step))));
    t.inv_sqrt_bias2 = static_cast<float>(1.0 / sqrt(1.0 - pow(c.beta2, static_cast<double>(step))));
    t.decay = static_cast<float>(1.0 - lr * c.weight_decay);
  }
  p.table[i] = t;
}

inline void fill_table(const char* name, const OptimizerTensor* tensors, int64_t count, const Counting& counting,
                       OptimizerTensor* table, Stream stream) {
  Rows rows{};
  rows.counting = counting;
  for (int64_t first = 0; first < count; first += kRowsPerLaunch) {
    rows.table = table + first;
    rows.count = static_cast<int>(count - first < kRowsPerLaunch ? count - first : kRowsPerLaunch);
    std::memcpy(rows.rows, tensors + first, rows.count * sizeof(OptimizerTensor));
    launch(name, fill_rows, dim3((rows.count + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, rows);
  }
}

// The tensor of the table that holds `position` of the concatenation: the last that begins at or before it.
__device__ __forceinline__ int64_t index_at(const OptimizerTensor* table, int64_t count, int64_t position) {
  int64_t i = 0;
  for (int64_t above = count; above - i > 1;) {
    const int64_t middle = (i + above) / 2;
    (table[middle].begin <= position ? i : above) = middle;
  }
  return i;
}

// f(Tag<T>) for the type behind `dtype`.
template <class F>
__device__ __forceinline__ void with_type(DType dtype, F&& f) {
  if (dtype == DType::float32)
    f(Tag<float>{});
  else if (dtype == DType::bfloat16)
    f(Tag<__nv_bfloat16>{});
  else
    f(Tag<__half>{});
}

// ---- Step

// What a parameter is, apart from its dtype: the rounding of a master in float32, or itself what is stepped; rounded to
// nearest, or at random if it is bfloat16.
template <bool kMasteredValue, bool kAtRandomValue>
struct Kept {
  static constexpr bool kMastered = kMasteredValue, kAtRandom = kAtRandomValue;
};

template <class Rule>
struct Step {
  const OptimizerTensor* table;
  int64_t count;
  float max_grad_norm, sign;
  bool zero_grads;
  uint64_t seed;
  const float *grad_norm, *grad_scale, *found_inf;
  Rule rule;
};

// What a block reads of the device's scalars.
struct Factors {
  float unscale, clip;  // clip has the sign of `maximize`
  bool write_grad;
};

template <class Rule>
__device__ __forceinline__ Factors factors_of(const Step<Rule>& s) {
  float clip = 1.0f;
  if (s.grad_norm != nullptr) {
    const float ratio = s.max_grad_norm / (*s.grad_norm + 1e-6f);
    clip = ratio >= 1.0f ? 1.0f : ratio;  // NaN stays NaN, as in clip_grad_norm_
  }
  return {s.grad_scale != nullptr ? 1.0f / *s.grad_scale : 1.0f, s.sign * clip,
          s.grad_scale != nullptr || s.zero_grads};
}

// p as the bits of a float whose high half is the bfloat16 that chance picks; reference/optimizer.py has the
// definition.
__device__ __forceinline__ float round_at_random(float p, uint32_t half) {
  const uint32_t bits = __float_as_uint(p);
  return (bits & 0x7f800000u) == 0x7f800000u ? p : __uint_as_float((bits + half) & 0xffff0000u);
}

// What a step starts from: the masters, but for the parameters that are not roundings of theirs, for then somebody else
// has written to them. A step at random leaves one of the master's two neighbours.
template <bool kAtRandom, class T, int V>
__device__ __forceinline__ void take_newest(float (&p)[V], const Run<T, V>& param, const Run<float, V>& master) {
  Run<T, V> rounding, other;
  if constexpr (kAtRandom && std::is_same_v<T, __nv_bfloat16>) {
    rounding.set([&](int k) { return round_at_random(master[k], 0); });
    other.set([&](int k) { return round_at_random(master[k], 0xffffu); });
  } else {
    rounding.set([&](int k) { return master[k]; });
    other = rounding;
  }
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const uint32_t found = __float_as_uint(param[k]);
    const bool ours = found == __float_as_uint(rounding[k]) || found == __float_as_uint(other[k]);
    p[k] = ours ? master[k] : param[k];
  }
}

// Elements [begin, end) in runs of V, a whole number of them. T: parameter, GT: gradient, ST: state.
template <class Kept, class T, class GT, class ST, int V, class Rule>
__device__ __forceinline__ void update(const OptimizerTensor& t, uint64_t row, const Step<Rule>& s, const Factors& f,
                                       int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V) {
    // Load.
    Run<T, V> param;
    Run<float, V> master;
    Run<GT, V> grad;
    if constexpr (Kept::kMastered) master.load_once(t.master + i);
    param.load_once(at<T>(t.param, i));
    grad.load_once(at<GT>(t.grad, i));
    typename Rule::template State<ST, V> state;
    state.load(t, i);

    // Update.
    float p[V];
    if constexpr (Kept::kMastered) take_newest<Kept::kAtRandom>(p, param, master);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if constexpr (!Kept::kMastered) p[k] = param[k];
      s.rule(t, p[k], grad[k] * f.unscale * f.clip, state, k);
    }

    // Store.
    if (f.write_grad) {
      grad.set([&](int k) { return s.zero_grads ? 0.0f : grad[k] * f.unscale; });
      grad.store(at<GT>(t.grad, i));
    }
    state.store(t, i);
    if constexpr (Kept::kMastered) {
      master.set([&](int k) { return p[k]; });
      master.store(t.master + i);
    }
    if constexpr (Kept::kAtRandom && std::is_same_v<T, __nv_bfloat16>) {
      const philox::Words random = philox::words(s.seed, row, static_cast<uint32_t>(i / 8));
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (V == 8 || i % 8 == k) p[k % V] = round_at_random(p[k % V], random.word[k / 2] >> (k % 2 * 16) & 0xffffu);
    }
    param.set([&](int k) { return p[k]; });
    param.store(at<T>(t.param, i));
  }
}

__device__ __forceinline__ bool packed(const OptimizerTensor& t) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  return (address(t.param) | address(t.grad) | address(t.master) | address(t.state[0]) | address(t.state[1]) |
          address(t.state[2])) %
             16 ==
         0;
}

template <class Kept, class Rule>
__global__ void __launch_bounds__(kThreads, Kept::kMastered ? 2 : 3) step(const __grid_constant__ Step<Rule> s) {
  const int64_t position = blockIdx.x * kOptimizerChunkCuda, index = index_at(s.table, s.count, position);
  const OptimizerTensor t = s.table[index];
  const int64_t begin = position - t.begin, left = t.numel - begin;
  const int64_t end = begin + (left < kOptimizerChunkCuda ? left : kOptimizerChunkCuda);
  if (overflowed(s.found_inf)) {  // nothing moves, but gradients that are to be zeroed are
    if (!s.zero_grads) return;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      if (t.grad_dtype == DType::float32)
        *at<float>(t.grad, i) = 0.0f;
      else
        *at<uint16_t>(t.grad, i) = 0;
    }
    return;
  }
  const Factors f = factors_of(s);
  uint64_t row = static_cast<uint64_t>(index);
  if constexpr (Kept::kAtRandom) row |= static_cast<uint64_t>(*t.step) << 32;

  with_type(t.dtype, [&](auto own) {
    auto of = [&](DType dtype, auto&& g) { dtype == t.dtype ? g(own) : g(Tag<float>{}); };
    of(t.grad_dtype, [&](auto grad) {
      of(t.state_dtype, [&](auto state) {
        using T = typename decltype(own)::type;
        using GT = typename decltype(grad)::type;
        using ST = typename decltype(state)::type;
        // Packets of 16 bytes as far as they go, then one by one.
        constexpr int V = sizeof(T) + sizeof(GT) + sizeof(ST) == 12 ? 4 : 8;
        const int64_t whole = packed(t) ? begin + (end - begin) / V * V : begin;
        update<Kept, T, GT, ST, V>(t, row, s, f, begin, whole);
        update<Kept, T, GT, ST, 1>(t, row, s, f, whole, end);
      });
    });
  });
}

// One step of the whole list, whose table is filled.
template <class Rule>
void launch_step(const char* name, const OptimizerParams& p, const Rule& rule, Stream stream) {
  const Step<Rule> s{p.table,
                     p.count,
                     static_cast<float>(p.max_grad_norm),
                     p.maximize ? -1.0f : 1.0f,
                     p.zero_grads,
                     p.rounding_seed,
                     p.grad_norm,
                     p.grad_scale,
                     p.found_inf,
                     rule};
  const auto chunks = static_cast<unsigned>(p.total / kOptimizerChunkCuda);
  if (chunks == 0) return;
  const bool mastered = p.tensors[0].master != nullptr;
  auto kernel = mastered ? step<Kept<true, false>, Rule> : step<Kept<false, false>, Rule>;
  if constexpr (Rule::kCountsSteps)
    if (p.stochastic) kernel = mastered ? step<Kept<true, true>, Rule> : step<Kept<false, true>, Rule>;
  launch(name, kernel, dim3(chunks), dim3(kThreads), 0, stream, s);
}

}  // namespace torchweld::cuda
