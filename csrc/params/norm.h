// The params of layer_norm and rms_norm.
#pragma once

#include "params/types.h"
#include "philox.h"

namespace torchweld {

// y = (s - mean) * rstd * (weight + weight_offset) + bias over rows of N, where s = input, or residual +
// dropout(input). RMS norm is a layer norm that is not centred: its mean is 0, and rstd that of the mean square. M
// rows, N columns.
struct LayerNormParams {
  int64_t rows, cols;
  float eps;
  bool centred;
  float weight_offset;  // 1 for a zero-centred weight, else 0
  DType dtype;          // of the activations: input, output, doutput and dx
  DType weight_dtype;   // of weight, bias and their gradients
  DType sum_dtype;      // of s: residual, sum, dsum and dinput; float32 or `dtype`, which it is without a residual
  Dropout dropout;      // of the input, only with a residual; element (row, column) of its mask is that of the input
};

struct LayerNormForwardParams : LayerNormParams {
  const void* input;       // [M, N]
  const void* residual;    // [M, N], nullptr: plain layer norm
  const void* weight;      // [N], nullptr: ones
  const void* bias;        // [N], nullptr: zeros
  void* sum;               // [M, N] what is normalised, nullptr without a residual
  void* output;            // [M, N]
  float* mean;             // [M], nullptr: not centred, or no backward will follow
  float* rstd;             // [M], nullptr: no backward will follow
  float* workspace;        // [workspace_size]
  int64_t workspace_size;  // at least what layer_norm_forward_workspace asks for
};

struct LayerNormBackwardParams : LayerNormParams {
  const void* doutput;  // [M, N]
  const void* dsum;     // [M, N] gradient that reaches the sum from elsewhere, nullptr: none
  const void* input;    // [M, N] what was normalised, of sum_dtype
  const void* weight;   // [N], nullptr: ones
  const float* mean;    // [M], nullptr: not centred
  const float* rstd;    // [M]
  void* dinput;         // [M, N] gradient of what was normalised, nullptr: not wanted
  void* dx;             // [M, N] the same through the dropout, nullptr: not wanted, or no other than dinput
  void* dweight;        // [N], nullptr: not wanted
  void* dbias;          // [N], nullptr: not wanted
  int64_t blocks;       // of the workspace, as many as layer_norm_workspace asks for
  float* partial;  // [blocks, 2, N] workspace: dweight and dbias of each block of rows, to be summed in a fixed order
};

}  // namespace torchweld
