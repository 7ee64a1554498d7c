// One plain struct per op and direction: sizes, scalars, and pointers with their [shape]. Everything below the bindings
// speaks in these, so kernels need no torch, no Python and (on the CPU) no CUDA. Contiguous unless a stride is given.
#pragma once

#include <cstdint>

namespace torchweld {

enum class DType : int32_t { float32, bfloat16, float16 };

// A CUDA stream; nullptr on the CPU.
using Stream = void*;

// y = (s - mean) * rstd * weight + bias over rows of N, where s = input (+ residual, when there is one).
// M rows, N columns. `dtype` is that of the activations, `weight_dtype` that of weight, bias and their gradients.
struct LayerNormForwardParams {
  int64_t rows, cols;
  float eps;
  DType dtype, weight_dtype;
  const void* input;     // [M, N]
  const void* residual;  // [M, N], nullptr: plain layer norm
  const void* weight;    // [N], nullptr: ones
  const void* bias;      // [N], nullptr: zeros
  void* sum;             // [M, N] input + residual, nullptr without a residual
  void* output;          // [M, N]
  float* mean;           // [M]
  float* rstd;           // [M]
};

struct LayerNormBackwardParams {
  int64_t rows, cols;
  DType dtype, weight_dtype;
  const void* doutput;  // [M, N]
  const void* dsum;     // [M, N] gradient that reaches the sum from elsewhere, nullptr: none
  const void* input;    // [M, N] what was normalised: input, or input + residual
  const void* weight;   // [N], nullptr: ones
  const float* mean;    // [M]
  const float* rstd;    // [M]
  void* dinput;         // [M, N], nullptr: not wanted
  void* dweight;        // [N], nullptr: not wanted
  void* dbias;          // [N], nullptr: not wanted
  int64_t blocks;       // of the workspace, as many as layer_norm_workspace asks for
  float* partial;       // [blocks, 2, N] workspace: dweight and dbias of each block of rows, to be summed in a fixed order
};

}  // namespace torchweld
