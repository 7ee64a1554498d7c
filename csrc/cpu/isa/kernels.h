// The CPU kernels of one instruction set, as a table. No STL here: this header is compiled with the flags of each set,
// and a weak symbol that the linker picked from the AVX-512 build would crash an older CPU.
#pragma once

#include "params/activation.h"
#include "params/attention.h"
#include "params/loss.h"
#include "params/norm.h"
#include "params/optimizer.h"
#include "params/rotary.h"

namespace torchweld::cpu {

struct Kernels {
  const char* isa;  // table.cpp takes it from the compiler's flags
  void (*layer_norm_forward)(const LayerNormForwardParams&);
  void (*layer_norm_backward)(const LayerNormBackwardParams&);
  void (*adamw)(const AdamWParams&);
  void (*grad_norm)(const GradNormParams&);
  void (*sgd)(const SgdParams&);
  void (*cross_entropy_forward)(const CrossEntropyForwardParams&);
  void (*cross_entropy_backward)(const CrossEntropyBackwardParams&);
  void (*dropout)(const DropoutParams&);
  void (*gelu_forward)(const GeluForwardParams&);
  void (*gelu_backward)(const GeluBackwardParams&);
  void (*gated_forward)(const GatedForwardParams&);
  void (*gated_backward)(const GatedBackwardParams&);
  void (*rotary_embedding)(const RotaryParams&);
  int64_t (*attention_forward_workspace)(const AttentionForwardParams&);  // how many floats
  void (*attention_forward)(const AttentionForwardParams&);
  int64_t (*attention_backward_workspace)(const AttentionBackwardParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
  int64_t (*linear_cross_entropy_workspace)(const LinearCrossEntropyParams&);
  void (*linear_cross_entropy)(const LinearCrossEntropyParams&);
  int64_t (*paged_attention_workspace)(const PagedAttentionParams&);
  void (*paged_attention)(const PagedAttentionParams&);
};

#ifdef TORCHWELD_ISA  // baseline, avx2, avx512, avx512_bf16 or amx: set by the build for each of the compilations
  // The instruction set of the kernels without matrix products: `isa`, but avx512_bf16 for amx.
  #ifndef TORCHWELD_VECTOR_ISA
    #define TORCHWELD_VECTOR_ISA TORCHWELD_ISA
  #endif

namespace TORCHWELD_VECTOR_ISA {

void layer_norm_forward(const LayerNormForwardParams& p);
void layer_norm_backward(const LayerNormBackwardParams& p);
void adamw(const AdamWParams& p);
void grad_norm(const GradNormParams& p);
void sgd(const SgdParams& p);
void cross_entropy_forward(const CrossEntropyForwardParams& p);
void cross_entropy_backward(const CrossEntropyBackwardParams& p);
void dropout(const DropoutParams& p);
void gelu_forward(const GeluForwardParams& p);
void gelu_backward(const GeluBackwardParams& p);
void gated_forward(const GatedForwardParams& p);
void gated_backward(const GatedBackwardParams& p);
void rotary_embedding(const RotaryParams& p);

}  // namespace TORCHWELD_VECTOR_ISA

namespace avx512 {  // called by the sets that multiply bf16, for heads too narrow for that

int64_t attention_forward_workspace(const AttentionForwardParams& p);
void attention_forward(const AttentionForwardParams& p);
int64_t attention_backward_workspace(const AttentionBackwardParams& p);
void attention_backward(const AttentionBackwardParams& p);

}  // namespace avx512

namespace TORCHWELD_ISA {

int64_t attention_forward_workspace(const AttentionForwardParams& p);
void attention_forward(const AttentionForwardParams& p);
int64_t attention_backward_workspace(const AttentionBackwardParams& p);
void attention_backward(const AttentionBackwardParams& p);
int64_t linear_cross_entropy_workspace(const LinearCrossEntropyParams& p);
void linear_cross_entropy(const LinearCrossEntropyParams& p);
int64_t paged_attention_workspace(const PagedAttentionParams& p);
void paged_attention(const PagedAttentionParams& p);

}  // namespace TORCHWELD_ISA
#endif

}  // namespace torchweld::cpu
