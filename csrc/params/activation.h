// The params of gelu, of dropout and of the gated activations.
#pragma once

#include "params/types.h"
#include "philox.h"

namespace torchweld {

// output = input * Phi(input); E elements.
struct GeluParams {
  int64_t numel;
  bool exact;  // Phi itself, not its tanh approximation
  DType dtype;
  const void* input;  // [E]
};

struct GeluForwardParams : GeluParams {
  void* output;  // [E]
};

struct GeluBackwardParams : GeluParams {
  const void* doutput;  // [E]
  void* dinput;         // [E]
};

// output = input * factors of the mask, over M rows of N columns. The backward is the same, of the gradient.
struct DropoutParams {
  int64_t rows, cols;
  Dropout dropout;
  DType dtype;
  const void* input;  // [M, N]
  void* output;       // [M, N]
};

enum class Activation : int32_t { silu, gelu, gelu_tanh };

// output = activation(gate) * up over M rows of N columns. A stride is the distance of rows, in elements.
struct GatedParams {
  int64_t rows, cols;
  Activation activation;
  DType dtype;
  const void* gate;  // [M, N]
  const void* up;    // [M, N]
  int64_t gate_stride, up_stride;
};

struct GatedForwardParams : GatedParams {
  void* output;  // [M, N] contiguous
};

struct GatedBackwardParams : GatedParams {
  const void* doutput;  // [M, N] contiguous
  void* dgate;          // [M, N]
  void* dup;            // [M, N]
  int64_t dgate_stride, dup_stride;
};

}  // namespace torchweld
