// The params of cross_entropy and linear_cross_entropy.
#pragma once

#include "params/types.h"

namespace torchweld {

// loss = (1 - smoothing) * (lse - logits[target]) + smoothing * (lse - mean(logits)), lse = log(sum(exp(logits))), over
// rows of V classes. A row whose target is `ignore_index` has loss 0 and no gradient.
struct CrossEntropyParams {
  int64_t rows, classes, ignore_index;  // M, V
  float smoothing;
  DType dtype;            // of logits and dlogits
  const void* logits;     // [M, V]
  const int64_t* target;  // [M]
};

struct CrossEntropyForwardParams : CrossEntropyParams {
  float* loss;  // [M]
  float* max;   // [M] of the logits
  float* sum;   // [M] of exp(logits - max)
};

struct CrossEntropyBackwardParams : CrossEntropyParams {
  const float* dloss;  // [M]
  const float* max;    // [M] as the forward left it
  const float* sum;    // [M] as the forward left it
  void* dlogits;       // [M, V]
};

// The losses of CrossEntropyParams plus z_loss * lse^2, of logits = softcap * tanh((input @ weight^T + bias) /
// softcap), and the gradients of input, weight and bias for given gradients of the losses. softcap 0: no cap. N rows of
// H features, V classes. Rows whose target is `ignore_index` are not read; their loss and gradient are 0.
struct LinearCrossEntropyParams {
  int64_t rows, features, classes, ignore_index;
  float smoothing, softcap, z_loss;
  DType dtype;            // of input, weight and their gradients
  const void* input;      // [N, H]
  const void* weight;     // [V, H]
  const float* bias;      // [V], nullptr: zeros
  const int64_t* target;  // [N]
  const float* dloss;     // [N], nullptr: no gradient is wanted
  float* loss;            // [N]
  void* dinput;           // [N, H], nullptr: not wanted
  void* dweight;          // [V, H], nullptr: not wanted
  float* dbias;           // [V], nullptr: not wanted
  float* workspace;       // linear_cross_entropy_workspace floats
};

}  // namespace torchweld
