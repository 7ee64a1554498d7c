// What the steps of all optimizers share.
//
// fill_table   thread -> tensor     copies the rows of the list from kernel arguments to device memory
// step         block -> one chunk of kOptimizerChunkCuda elements, which it finds in the table by its position
//
// Rows travel as kernel arguments: nothing on the host must outlive the call, a CUDA graph holds them, and no pointer
// becomes stale. One launch of fill_table carries kRowsPerLaunch tensors; step is one launch for any list. lr, the
// steps, grad_scale, found_inf and the norm are read on the device, so the host never waits. An optimizer adds a rule:
// it maps parameter and gradient to the new parameter, one vector of elements at a time.
#pragma once

#include "cuda/common.cuh"
#include "params/optimizer.h"
#include "philox.h"

namespace torchweld::cuda::optimizer {

constexpr int kThreads = 256;

// CUDA 12.1 raised the size of a kernel's arguments from 4 KB to 32764 bytes.
constexpr int kArgumentBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;
constexpr int kRowsPerLaunch = (kArgumentBytes - 128) / sizeof(OptimizerTensor);

__device__ __forceinline__ bool overflowed(const float* found_inf) {
  return found_inf != nullptr && *found_inf != 0.0f;
}

// ---- Table

// What the step size of a row follows from, in double: the hyperparameters of AdamW, or the learning rate of SGD.
struct StepSizes {
  double lr, beta1, beta2, weight_decay;
  const float *lr_tensor, *found_inf;
};

struct TableRows {
  OptimizerTensor* table;  // where the first of these rows goes
  int count;
  StepSizes step_sizes;
  OptimizerTensor rows[kRowsPerLaunch];
};
static_assert(sizeof(TableRows) <= kArgumentBytes, "the rows of one launch must fit its arguments");

static __global__ void __launch_bounds__(kThreads) fill_rows(const __grid_constant__ TableRows p) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= p.count) return;
  OptimizerTensor t = p.rows[i];
  const StepSizes& c = p.step_sizes;
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

inline void fill_table(const char* name, const OptimizerTensor* tensors, int64_t count, const StepSizes& step_sizes,
                       OptimizerTensor* table, Stream stream) {
  TableRows rows{};
  rows.step_sizes = step_sizes;
  for (int64_t first = 0; first < count; first += kRowsPerLaunch) {
    rows.table = table + first;
    rows.count = static_cast<int>(count - first < kRowsPerLaunch ? count - first : kRowsPerLaunch);
    std::memcpy(rows.rows, tensors + first, rows.count * sizeof(OptimizerTensor));
    launch(name, fill_rows, dim3((rows.count + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, rows);
  }
}

// The tensor of the table that holds `position` of the concatenated list: the last that begins at or before it.
__device__ __forceinline__ int64_t index_at(const OptimizerTensor* table, int64_t count, int64_t position) {
  int64_t i = 0;
  for (int64_t above = count; above - i > 1;) {
    const int64_t middle = (i + above) / 2;
    (table[middle].begin <= position ? i : above) = middle;
  }
  return i;
}

// Calls f(Tag<T>) for the type behind `dtype`.
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

// How a parameter is stored, apart from its dtype. With a master in float32 the parameter is its rounding; without, it
// is stepped itself. A bfloat16 parameter is rounded to nearest or stochastically.
template <bool kHasMasterValue, bool kStochasticValue>
struct ParamStorage {
  static constexpr bool kHasMaster = kHasMasterValue, kStochastic = kStochasticValue;
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

// What a step applies to every gradient.
struct GradientFactors {
  float unscale, clip;  // clip has the sign of `maximize`
  bool write_grad;
};

template <class Rule>
__device__ __forceinline__ GradientFactors gradient_factors(const Step<Rule>& s) {
  float clip = 1.0f;
  if (s.grad_norm != nullptr) {
    const float ratio = s.max_grad_norm / (*s.grad_norm + 1e-6f);
    clip = ratio >= 1.0f ? 1.0f : ratio;  // NaN stays NaN, as in clip_grad_norm_
  }
  return {s.grad_scale != nullptr ? 1.0f / *s.grad_scale : 1.0f, s.sign * clip,
          s.grad_scale != nullptr || s.zero_grads};
}

// Stochastic rounding: the high half of the returned float's bits is a bfloat16. reference/optimizer.py defines it.
__device__ __forceinline__ float round_stochastically(float p, uint32_t half) {
  const uint32_t bits = __float_as_uint(p);
  return (bits & 0x7f800000u) == 0x7f800000u ? p : __uint_as_float((bits + half) & 0xffff0000u);
}

// The values that a step starts from: the masters, except where a parameter is not the rounding of its master: somebody
// else has written to that parameter. Stochastic rounding may have picked either neighbour of the master.
template <bool kStochastic, class T, int V>
__device__ __forceinline__ void newest_params(float (&p)[V], const Vector<T, V>& param,
                                              const Vector<float, V>& master) {
  Vector<T, V> rounding, other;
  if constexpr (kStochastic && std::is_same_v<T, __nv_bfloat16>) {
    rounding.set([&](int k) { return round_stochastically(master[k], 0); });
    other.set([&](int k) { return round_stochastically(master[k], 0xffffu); });
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

// Updates elements [begin, end), a multiple of V, in vectors of V. T: parameter, GT: gradient, ST: state.
template <class Storage, class T, class GT, class ST, int V, class Rule>
__device__ __forceinline__ void update(const OptimizerTensor& t, uint64_t row, const Step<Rule>& s,
                                       const GradientFactors& f, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V) {
    // Load.
    Vector<T, V> param;
    Vector<float, V> master;
    Vector<GT, V> grad;
    if constexpr (Storage::kHasMaster) master.load_once(t.master + i);
    param.load_once(at<T>(t.param, i));
    grad.load_once(at<GT>(t.grad, i));
    typename Rule::template State<ST, V> state;
    state.load(t, i);

    // Update.
    float p[V];
    if constexpr (Storage::kHasMaster) newest_params<Storage::kStochastic>(p, param, master);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if constexpr (!Storage::kHasMaster) p[k] = param[k];
      s.rule(t, p[k], grad[k] * f.unscale * f.clip, state, k);
    }

    // Store.
    if (f.write_grad) {
      grad.set([&](int k) { return s.zero_grads ? 0.0f : grad[k] * f.unscale; });
      grad.store(at<GT>(t.grad, i));
    }
    state.store(t, i);
    if constexpr (Storage::kHasMaster) {
      master.set([&](int k) { return p[k]; });
      master.store(t.master + i);
    }
    if constexpr (Storage::kStochastic && std::is_same_v<T, __nv_bfloat16>) {
      const philox::Words random = philox::words(s.seed, row, static_cast<uint32_t>(i / 8));
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (V == 8 || i % 8 == k / V * V)
          p[k % V] = round_stochastically(p[k % V], random.word[k / 2] >> (k % 2 * 16) & 0xffffu);
    }
    param.set([&](int k) { return p[k]; });
    param.store(at<T>(t.param, i));
  }
}

__device__ __forceinline__ bool can_vectorize(const OptimizerTensor& t) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  return (address(t.param) | address(t.grad) | address(t.master) | address(t.state[0]) | address(t.state[1]) |
          address(t.state[2])) %
             16 ==
         0;
}

template <class Storage, class Rule>
__global__ void __launch_bounds__(kThreads, 3) step(const __grid_constant__ Step<Rule> s) {
  const int64_t position = blockIdx.x * kOptimizerChunkCuda, index = index_at(s.table, s.count, position);
  const OptimizerTensor t = s.table[index];
  const int64_t begin = position - t.begin, left = t.numel - begin;
  const int64_t end = begin + (left < kOptimizerChunkCuda ? left : kOptimizerChunkCuda);
  if (overflowed(s.found_inf)) {  // parameters do not move, but zero_grads applies
    if (!s.zero_grads) return;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      if (t.grad_dtype == DType::float32)
        *at<float>(t.grad, i) = 0.0f;
      else
        *at<uint16_t>(t.grad, i) = 0;
    }
    return;
  }
  const GradientFactors f = gradient_factors(s);
  uint64_t row = static_cast<uint64_t>(index);
  if constexpr (Storage::kStochastic) row |= static_cast<uint64_t>(*t.step) << 32;

  with_type(t.dtype, [&](auto own) {
    auto of = [&](DType dtype, auto&& g) { dtype == t.dtype ? g(own) : g(Tag<float>{}); };
    of(t.grad_dtype, [&](auto grad) {
      of(t.state_dtype, [&](auto state) {
        using T = typename decltype(own)::type;
        using GT = typename decltype(grad)::type;
        using ST = typename decltype(state)::type;
        // Vectors as far as possible, then single elements. Where there are floats a lane owns 4 neighbours: 16 bytes
        // of floats, 8 of 16-bit elements, and no access of a warp leaves out part of a sector.
        constexpr bool kFloats = Storage::kHasMaster || sizeof(T) + sizeof(GT) + sizeof(ST) > 6;
        constexpr int V = kFloats ? 4 : 8;
        const int64_t vector_end = can_vectorize(t) ? begin + (end - begin) / V * V : begin;
        update<Storage, T, GT, ST, V>(t, row, s, f, begin, vector_end);
        update<Storage, T, GT, ST, 1>(t, row, s, f, vector_end, end);
      });
    });
  });
}

// One step of the whole list. The table must be filled.
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
  const bool has_master = p.tensors[0].master != nullptr;
  auto kernel = has_master ? step<ParamStorage<true, false>, Rule> : step<ParamStorage<false, false>, Rule>;
  if constexpr (Rule::kCountsSteps)
    if (p.stochastic)
      kernel = has_master ? step<ParamStorage<true, true>, Rule> : step<ParamStorage<false, true>, Rule>;
  launch(name, kernel, dim3(chunks), dim3(kThreads), 0, stream, s);
}

}  // namespace torchweld::cuda::optimizer
