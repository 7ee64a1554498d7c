// The launchers of the CUDA kernels, and a table of them with the member names of the CPU's table: csrc/bindings/*.h
// use both. A launcher enqueues on `stream` of the current device and returns. It neither allocates nor waits.
#pragma once

#include "params/activation.h"
#include "params/attention.h"
#include "params/loss.h"
#include "params/norm.h"
#include "params/optimizer.h"
#include "params/rotary.h"

namespace torchweld::cuda {

void adamw(const AdamWParams& p, Stream stream);
void grad_norm(const GradNormParams& p, Stream stream);
void attention_forward(const AttentionForwardParams& p, Stream stream);
void attention_backward(const AttentionBackwardParams& p, Stream stream);
void paged_attention(const PagedAttentionParams& p, Stream stream);
void cross_entropy_forward(const CrossEntropyForwardParams& p, Stream stream);
void cross_entropy_backward(const CrossEntropyBackwardParams& p, Stream stream);
void dropout(const DropoutParams& p, Stream stream);
void gelu_forward(const GeluForwardParams& p, Stream stream);
void gelu_backward(const GeluBackwardParams& p, Stream stream);
void gated_forward(const GatedForwardParams& p, Stream stream);
void gated_backward(const GatedBackwardParams& p, Stream stream);
void rotary_embedding(const RotaryParams& p, Stream stream);
void sgd(const SgdParams& p, Stream stream);
void layer_norm_forward(const LayerNormForwardParams& p, Stream stream);
void layer_norm_backward(const LayerNormBackwardParams& p, Stream stream);

// The floats of workspace that layer_norm_forward needs on the device with this index.
int64_t layer_norm_forward_workspace(int64_t rows, int64_t cols, int device);

// The (2, cols) float32 blocks of workspace that layer_norm_backward needs on the device with this index.
int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int device);

// The floats of workspace that each op needs.
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
  void (*cross_entropy_forward)(const CrossEntropyForwardParams&, Stream) = cuda::cross_entropy_forward;
  void (*cross_entropy_backward)(const CrossEntropyBackwardParams&, Stream) = cuda::cross_entropy_backward;
  void (*dropout)(const DropoutParams&, Stream) = cuda::dropout;
  void (*gelu_forward)(const GeluForwardParams&, Stream) = cuda::gelu_forward;
  void (*gelu_backward)(const GeluBackwardParams&, Stream) = cuda::gelu_backward;
  void (*gated_forward)(const GatedForwardParams&, Stream) = cuda::gated_forward;
  void (*gated_backward)(const GatedBackwardParams&, Stream) = cuda::gated_backward;
  void (*rotary_embedding)(const RotaryParams&, Stream) = cuda::rotary_embedding;
  void (*sgd)(const SgdParams&, Stream) = cuda::sgd;
  void (*layer_norm_forward)(const LayerNormForwardParams&, Stream) = cuda::layer_norm_forward;
  void (*layer_norm_backward)(const LayerNormBackwardParams&, Stream) = cuda::layer_norm_backward;
};

}  // namespace torchweld::cuda
