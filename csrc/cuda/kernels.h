// The CUDA kernels of the module, as a table with the CPU table's member names: csrc/bindings/*.h serve both. Each
// launcher enqueues on `stream` of the current device and returns; it neither allocates nor waits.
#pragma once

#include "params.h"

namespace torchweld::cuda {

void adamw(const AdamWParams& p, Stream stream);
void grad_norm(const GradNormParams& p, Stream stream);
void attention_forward(const AttentionForwardParams& p, Stream stream);
void attention_backward(const AttentionBackwardParams& p, Stream stream);
void paged_attention(const PagedAttentionParams& p, Stream stream);
void sgd(const SgdParams& p, Stream stream);
void layer_norm_forward(const LayerNormForwardParams& p, Stream stream);
void layer_norm_backward(const LayerNormBackwardParams& p, Stream stream);

// How many float32 elements layer_norm_forward wants for its workspace on the device with this index.
int64_t layer_norm_forward_workspace(int64_t rows, int64_t cols, int device);

// How many (2, cols) float32 blocks the workspace of layer_norm_backward holds on the device with this index.
int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int device);

// How many floats of workspace they want.
int64_t attention_forward_workspace(const AttentionForwardParams& p);
int64_t attention_backward_workspace(const AttentionBackwardParams& p);
int64_t paged_attention_workspace(const PagedAttentionParams& p);

struct Kernels {
  void (*adamw)(const AdamWParams&, Stream) = cuda::adamw;
  void (*grad_norm)(const GradNormParams&, Stream) = cuda::grad_norm;
  void (*attention_forward)(const AttentionForwardParams&, Stream) = cuda::attention_forward;
  void (*attention_backward)(const AttentionBackwardParams&, Stream) = cuda::attention_backward;
  int64_t (*attention_forward_workspace)(const AttentionForwardParams&) = cuda::attention_forward_workspace;
  int64_t (*attention_backward_workspace)(const AttentionBackwardParams&) = cuda::attention_backward_workspace;
  void (*paged_attention)(const PagedAttentionParams&, Stream) = cuda::paged_attention;
  int64_t (*paged_attention_workspace)(const PagedAttentionParams&) = cuda::paged_attention_workspace;
  void (*sgd)(const SgdParams&, Stream) = cuda::sgd;
  void (*layer_norm_forward)(const LayerNormForwardParams&, Stream) = cuda::layer_norm_forward;
  void (*layer_norm_backward)(const LayerNormBackwardParams&, Stream) = cuda::layer_norm_backward;
};

}  // namespace torchweld::cuda
