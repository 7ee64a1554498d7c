// The params of the optimizers' steps and of grad_norm.
#pragma once

#include "params/types.h"

namespace torchweld {

// One tensor of an optimizer's list: the parameter and what belongs to it, dense and with the same strides, so that the
// order of the elements in memory serves for all of them. A list is worked on as one range: its concatenation, in which
// each tensor is padded to whole chunks.
struct OptimizerTensor {
  void* param;     // [numel]
  void* grad;      // [numel], written only when there is a grad_scale or zero_grads
  float* master;   // [numel] what is stepped in param's place, which becomes its rounding; nullptr: param itself.
                   // Where param is not its rounding before the step, the step starts from param
  void* state[3];  // [numel] AdamW: mean of the gradient, of its square, and its maximum (nullptr: no AMSGrad).
                   // SGD: momentum buffer (nullptr: no momentum)
  float* step;     // [] updates so far; SGD does not count them
  int64_t numel;
  int64_t begin;                           // where it starts in the concatenation
  DType dtype, grad_dtype, state_dtype;    // of param, of grad, of the state
  float step_size, inv_sqrt_bias2, decay;  // filled by the kernel, from lr and the step
};

constexpr int64_t kOptimizerChunkCpu = 64;      // elements; a smaller tensor costs about as much
constexpr int64_t kOptimizerChunkCuda = 16384;  // elements of one thread block
constexpr int64_t kGradNormBlocks = 1024;       // partial sums of a norm, so that the additions have a fixed order

struct OptimizerParams {
  int64_t count, total;      // tensors; elements of the concatenation
  OptimizerTensor* tensors;  // [count], on the host
  OptimizerTensor* table;    // [count], their copy on the device; nullptr on the CPU
  double lr, weight_decay, max_grad_norm;
  bool maximize;
  bool zero_grads;  // gradients are left as zeros, also after an overflow
  bool stochastic;  // bfloat16 parameters are rounded at random: reference/optimizer.py
  uint64_t rounding_seed;
  const float* lr_tensor;   // [], nullptr: lr above
  const float* grad_norm;   // [] of the unscaled gradients, nullptr: no clipping
  const float* grad_scale;  // [] what the gradients are to be divided by, nullptr: 1
  const float* found_inf;   // [] not zero: overflow, nothing moves; nullptr: none
};

struct AdamWParams : OptimizerParams {
  double beta1, beta2, eps;
  bool decoupled;  // AdamW, else weight_decay is an L2 term of the gradient
};

struct SgdParams : OptimizerParams {
  double momentum, dampening;
  bool nesterov, first_step;  // first_step: the momentum buffers are new, dampening does not count yet
};

struct GradNormParams {
  int64_t count, total;
  OptimizerTensor* tensors;  // [count], of which only grad, grad_dtype, numel and begin are set
  OptimizerTensor* table;
  const float* grad_scale;
  double* partial;  // [kGradNormBlocks]
  float* norm;      // []
};

}  // namespace torchweld
