// AdamW and Adam, one step over a list of tensors, and the norm of a list of gradients; the formula is in cpu/adamw.cpp.
//
// fill_table   thread -> tensor     takes the rows of the list as kernel arguments, counts each tensor's step, works out
//                                   what depends on it (in double), and leaves the rows in device memory
// step         block -> one chunk of kAdamWChunkCuda elements, found in the table by its position
// square_sums  block b of kGradNormBlocks -> chunks b, b + kGradNormBlocks, ..: one partial sum each
// finish_norm  one block adds the partials in a fixed order
//
// The rows travel as arguments, so nothing on the host must outlive the call, a CUDA graph keeps them, and no pointer
// can go stale; one launch of fill_table carries kRowsPerLaunch tensors. step is one launch whatever the length of the
// list. lr, the steps, grad_scale, found_inf and the norm are read on the device: the host never waits.
// Bytes: 28 per fp32 parameter (read p, g, m, v; write p, m, v), 14 all in 16 bits, in 16-byte packets; the norm reads g.
// Loshchilov, Hutter: arXiv:1711.05101. Kingma, Ba: arXiv:1412.6980.

#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace torchweld::cuda {
namespace {

constexpr int kThreads = 256;

// CUDA 12.1 raised the arguments of a kernel from 4 KB to 32764 bytes.
constexpr int kArgumentBytes = CUDART_VERSION >= 12010 ? 32764 : 4096;
constexpr int kRowsPerLaunch = (kArgumentBytes - 128) / sizeof(AdamWTensor);

template <class T>
__device__ __forceinline__ T* at(void* base, int64_t index) { return static_cast<T*>(base) + index; }

__device__ __forceinline__ bool overflowed(const float* found_inf) { return found_inf != nullptr && *found_inf != 0.0f; }

// ---- Table

struct Rows {
  AdamWTensor* table;  // where the first of these rows goes
  int count;
  double lr, beta1, beta2, weight_decay;
  const float *lr_tensor, *found_inf;
  AdamWTensor rows[kRowsPerLaunch];
};
static_assert(sizeof(Rows) <= kArgumentBytes, "the rows of one launch must fit its arguments");

__global__ void __launch_bounds__(kThreads) fill_table(const __grid_constant__ Rows p) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i >= p.count) return;
  AdamWTensor t = p.rows[i];
  if (t.step != nullptr && !overflowed(p.found_inf)) {
    const double lr = p.lr_tensor != nullptr ? *p.lr_tensor : p.lr;
    const float step = *t.step + 1.0f;
    *t.step = step;
    t.step_size = static_cast<float>(lr / (1.0 - pow(p.beta1, static_cast<double>(step))));
    t.inv_sqrt_bias2 = static_cast<float>(1.0 / sqrt(1.0 - pow(p.beta2, static_cast<double>(step))));
    t.decay = static_cast<float>(1.0 - lr * p.weight_decay);
  }
  p.table[i] = t;
}

// The tensor of the table that holds `position` of the concatenation: the last that begins at or before it.
__device__ __forceinline__ AdamWTensor tensor_at(const AdamWTensor* table, int64_t count, int64_t position) {
  int64_t i = 0;
  for (int64_t above = count; above - i > 1;) {
    const int64_t middle = (i + above) / 2;
    (table[middle].begin <= position ? i : above) = middle;
  }
  return table[i];
}

// f(Tag<T>) for the type behind `dtype`.
template <class F>
__device__ __forceinline__ void with_type(DType dtype, F&& f) {
  if (dtype == DType::float32) f(Tag<float>{});
  else if (dtype == DType::bfloat16) f(Tag<__nv_bfloat16>{});
  else f(Tag<__half>{});
}

void fill(const char* name, const AdamWTensor* tensors, int64_t count, Rows& rows, AdamWTensor* table, Stream stream) {
  for (int64_t first = 0; first < count; first += kRowsPerLaunch) {
    rows.table = table + first;
    rows.count = static_cast<int>(count - first < kRowsPerLaunch ? count - first : kRowsPerLaunch);
    std::memcpy(rows.rows, tensors + first, rows.count * sizeof(AdamWTensor));
    launch(name, fill_table, dim3((rows.count + kThreads - 1) / kThreads), dim3(kThreads), 0, stream, rows);
  }
}

// ---- Step

struct Step {
  const AdamWTensor* table;
  int64_t count;
  float gain1, keep2, gain2, eps, l2, max_grad_norm, sign;
  const float *grad_norm, *grad_scale, *found_inf;
};

// What a block reads of the device's scalars.
struct Factors {
  float unscale, clip;  // clip has the sign of `maximize`
  bool write_grad;
};

__device__ __forceinline__ Factors factors_of(const Step& s) {
  float clip = 1.0f;
  if (s.grad_norm != nullptr) {
    const float ratio = s.max_grad_norm / (*s.grad_norm + 1e-6f);
    clip = ratio >= 1.0f ? 1.0f : ratio;  // NaN stays NaN, as in clip_grad_norm_
  }
  return {s.grad_scale != nullptr ? 1.0f / *s.grad_scale : 1.0f, s.sign * clip, s.grad_scale != nullptr};
}

// Elements [begin, end) in runs of V, a whole number of them. T: parameter, GT: gradient, ST: running means.
template <class T, class GT, class ST, int V>
__device__ __forceinline__ void update(const AdamWTensor& t, const Step& s, const Factors& f, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V) {
    // Load.
    Run<T, V> param;
    Run<GT, V> grad;
    Run<ST, V> exp_avg, exp_avg_sq, largest{};
    param.load_once(at<T>(t.param, i));
    grad.load_once(at<GT>(t.grad, i));
    exp_avg.load_once(at<ST>(t.exp_avg, i));
    exp_avg_sq.load_once(at<ST>(t.exp_avg_sq, i));
    if (t.max_exp_avg_sq != nullptr) largest.load_once(at<ST>(t.max_exp_avg_sq, i));

    // Update.
    float p[V], m[V], v[V], top[V];
#pragma unroll
    for (int k = 0; k < V; ++k) {
      float g = grad[k] * f.unscale * f.clip;
      p[k] = param[k];
      if (s.l2 != 0.0f) g += s.l2 * p[k];
      m[k] = exp_avg[k] + s.gain1 * (g - exp_avg[k]);
      v[k] = s.keep2 * exp_avg_sq[k] + s.gain2 * g * g;
      top[k] = largest[k] > v[k] ? largest[k] : v[k];  // NaN in v stays
      p[k] = t.decay * p[k] - t.step_size * m[k] / (sqrtf(top[k]) * t.inv_sqrt_bias2 + s.eps);
    }

    // Store.
    if (f.write_grad) {
      grad.set([&](int k) { return grad[k] * f.unscale; });
      grad.store(at<GT>(t.grad, i));
    }
    if (t.max_exp_avg_sq != nullptr) {
      largest.set([&](int k) { return top[k]; });
      largest.store(at<ST>(t.max_exp_avg_sq, i));
    }
    param.set([&](int k) { return p[k]; });
    exp_avg.set([&](int k) { return m[k]; });
    exp_avg_sq.set([&](int k) { return v[k]; });
    param.store(at<T>(t.param, i));
    exp_avg.store(at<ST>(t.exp_avg, i));
    exp_avg_sq.store(at<ST>(t.exp_avg_sq, i));
  }
}

__device__ __forceinline__ bool packed(const AdamWTensor& t) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  return (address(t.param) | address(t.grad) | address(t.exp_avg) | address(t.exp_avg_sq) | address(t.max_exp_avg_sq)) % 16 == 0;
}

__global__ void __launch_bounds__(kThreads, 4) step(const __grid_constant__ Step s) {
  if (overflowed(s.found_inf)) return;
  const int64_t position = blockIdx.x * kAdamWChunkCuda;
  const AdamWTensor t = tensor_at(s.table, s.count, position);
  const Factors f = factors_of(s);
  const int64_t begin = position - t.begin, left = t.numel - begin;
  const int64_t end = begin + (left < kAdamWChunkCuda ? left : kAdamWChunkCuda);

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
        update<T, GT, ST, V>(t, s, f, begin, whole);
        update<T, GT, ST, 1>(t, s, f, whole, end);
      });
    });
  });
}

// ---- Norm

struct Norm {
  const AdamWTensor* table;
  int64_t count, chunks;
  const float* grad_scale;
  double* partial;  // [kGradNormBlocks]
  float* norm;      // []
};

// The block's sum, in the order of a tree; thread 0 has it.
__device__ __forceinline__ double block_sum(double v) {
  double* sums = reinterpret_cast<double*>(shared_memory);
  sums[threadIdx.x] = v;
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return threadIdx.x == 0 ? sums[0] : 0.0;
}

template <class GT, int V>
__device__ __forceinline__ float squares_of(void* grad, int64_t begin, int64_t end) {
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V) {
    Run<GT, V> g;
    g.load(at<GT>(grad, i));  // kept in the caches: step reads it next
#pragma unroll
    for (int k = 0; k < V; ++k) sum += g[k] * g[k];
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) square_sums(const __grid_constant__ Norm p) {
  double squares = 0.0;
  for (int64_t chunk = blockIdx.x; chunk < p.chunks; chunk += kGradNormBlocks) {
    const AdamWTensor t = tensor_at(p.table, p.count, chunk * kAdamWChunkCuda);
    const int64_t begin = chunk * kAdamWChunkCuda - t.begin, left = t.numel - begin;
    const int64_t end = begin + (left < kAdamWChunkCuda ? left : kAdamWChunkCuda);
    with_type(t.grad_dtype, [&](auto tag) {
      using GT = typename decltype(tag)::type;
      constexpr int V = 16 / sizeof(GT);
      const bool packets = reinterpret_cast<uintptr_t>(t.grad) % 16 == 0;
      const int64_t whole = packets ? begin + (end - begin) / V * V : begin;
      squares += squares_of<GT, V>(t.grad, begin, whole);
      squares += squares_of<GT, 1>(t.grad, whole, end);
    });
  }
  squares = block_sum(squares);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = squares;
}

__global__ void __launch_bounds__(kGradNormBlocks) finish_norm(const __grid_constant__ Norm p) {
  const double total = block_sum(p.partial[threadIdx.x]);
  if (threadIdx.x == 0) *p.norm = static_cast<float>(sqrt(total)) / (p.grad_scale != nullptr ? fabsf(*p.grad_scale) : 1.0f);
}

}  // namespace

void adamw(const AdamWParams& p, Stream stream) {
  Rows rows{};
  rows.lr = p.lr;
  rows.beta1 = p.beta1;
  rows.beta2 = p.beta2;
  rows.weight_decay = p.decoupled ? p.weight_decay : 0.0;
  rows.lr_tensor = p.lr_tensor;
  rows.found_inf = p.found_inf;
  fill("adamw_", p.tensors, p.count, rows, p.table, stream);

  Step s{};
  s.table = p.table;
  s.count = p.count;
  s.gain1 = static_cast<float>(1 - p.beta1);
  s.keep2 = static_cast<float>(p.beta2);
  s.gain2 = static_cast<float>(1 - p.beta2);
  s.eps = static_cast<float>(p.eps);
  s.l2 = p.decoupled ? 0.0f : static_cast<float>(p.weight_decay);
  s.max_grad_norm = static_cast<float>(p.max_grad_norm);
  s.sign = p.maximize ? -1.0f : 1.0f;
  s.grad_norm = p.grad_norm;
  s.grad_scale = p.grad_scale;
  s.found_inf = p.found_inf;
  const auto chunks = static_cast<unsigned>(p.total / kAdamWChunkCuda);
  if (chunks > 0) launch("adamw_", step, dim3(chunks), dim3(kThreads), 0, stream, s);
}

void grad_norm(const GradNormParams& p, Stream stream) {
  Rows rows{};
  fill("grad_norm", p.tensors, p.count, rows, p.table, stream);
  const Norm n{p.table, p.count, p.total / kAdamWChunkCuda, p.grad_scale, p.partial, p.norm};
  launch("grad_norm", square_sums, dim3(kGradNormBlocks), dim3(kThreads), kThreads * sizeof(double), stream, n);
  launch("grad_norm", finish_norm, dim3(1), dim3(kGradNormBlocks), kGradNormBlocks * sizeof(double), stream, n);
}

}  // namespace torchweld::cuda
