// One plain struct per op and direction: sizes, scalars, and pointers with their [shape]. Everything below the bindings
// speaks in these, so kernels need no torch, no Python and (on the CPU) no CUDA. Contiguous unless a stride is given.
#pragma once

#include <cstdint>

#include "philox.h"

namespace torchweld {

enum class DType : int32_t { float32, bfloat16, float16 };

// A CUDA stream; nullptr on the CPU.
using Stream = void*;

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

constexpr int64_t kOptimizerChunkCpu = 64;      // elements; also what a tiny tensor costs, about
constexpr int64_t kOptimizerChunkCuda = 16384;  // elements of one thread block
constexpr int64_t kGradNormBlocks = 1024;       // partial sums of a norm: fixed, so that the order of the additions is

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

// out = softmax(scores) @ value per batch B and head H, with N queries and keys of size D (values: Dv). In this order:
//   scores = query @ key^T * scale,  softcap * tanh(scores / softcap),  + bias,  - slope * |i + shift - j|,
// and query i sees key j only where i + shift - left <= j <= i + shift + right. A sink adds exp(sink) to the softmax's
// denominator. Dropout multiplies the softmax by a mask. Hkv divides H: query head h uses key and value head h / (H /
// Hkv). Packed sequences lie one after another along the rows: [total_q, H, D] stands for [B, H, Nq, D], [H, total_q]
// for [B, H, Nq], and B counts them. Strides are in elements; along the last dimension it is 1. If packed, that of the
// batch is 0.
struct Strides {
  int64_t batch, head, row;
};

enum class MaskType : int32_t { none, boolean, float32, bfloat16, float16 };

// The rows of a dropout mask [B, H, Nq] of which a call has a part, as one of several devices does: query 0 of its head
// 0 is row `first`. Without a whole: 0, H and total_q of the call.
struct MaskRows {
  int64_t first, heads, queries;
};

struct AttentionInputs {
  int64_t batch, heads, kv_heads, queries, keys, dim,
      value_dim;                // B, H, Hkv, Nq, Nk, D, Dv; packed: the longest Nq, Nk
  int64_t total_q, total_k;     // rows of query, key and value: Nq, Nk unless packed
  const int32_t* cu_seqlens_q;  // [B + 1] where each sequence starts; nullptr: not packed
  const int32_t* cu_seqlens_k;  // [B + 1]
  int64_t first_row;            // 0; of one packed sequence: cu_seqlens_q of it
  DType dtype;                  // of query, key, value, output and their gradients
  float scale;
  float softcap;        // 0: none
  int64_t left, right;  // the band of keys that a query sees; at most kUnbounded
  bool bottom_right;    // shift is Nk - Nq, not 0
  int64_t offset;       // added to shift: queries and keys are parts of longer sequences
  bool part;            // of the keys of longer rows, of which output and statistics are in the backward
  Dropout dropout;      // the mask's rows are counted as mask_row() does, its columns as keys of the sequence
  MaskRows mask_rows;
  const void* query;  // [B, H, Nq, D]
  const void* key;    // [B, Hkv, Nk, D]
  const void* value;  // [B, Hkv, Nk, Dv]
  Strides query_strides, key_strides, value_strides;
  MaskType bias_type;
  const void* bias;            // [B, H, Nq, Nk], boolean (1: attend) or additive; nullptr: none
  Strides bias_strides;        // 0 where it is broadcast
  int64_t bias_step;           // along the keys: 1, or 0 where it is broadcast
  const float* alibi_slopes;   // [B, H], nullptr: none
  int64_t alibi_batch_stride;  // H, or 0 where it is broadcast
  const float* sinks;          // [H], nullptr: none
  float* workspace;            // as many elements as the op's workspace function asks for

  TW_HOST_DEVICE int64_t shift() const {
    return (bottom_right ? keys - queries : 0) + offset;
  }  // packed: of each sequence, from its own lengths

  // Where head (b, h) begins in what has one value per row, [B, H, Nq]. Packed: [H, total_q], b is 0 and the rows of a
  // sequence begin at `first_row`.
  TW_HOST_DEVICE int64_t row(int64_t b, int64_t h) const { return first_row + (b * heads + h) * total_q; }

  // Where head (b, h) begins in the rows of the dropout mask.
  TW_HOST_DEVICE int64_t mask_row(int64_t b, int64_t h) const {
    return mask_rows.first + first_row + (b * mask_rows.heads + h) * mask_rows.queries;
  }

  // Of an additive bias.
  DType bias_dtype() const {
    return bias_type == MaskType::bfloat16  ? DType::bfloat16
           : bias_type == MaskType::float16 ? DType::float16
                                            : DType::float32;
  }
};

constexpr int64_t kUnbounded = int64_t{1} << 40;

struct AttentionForwardParams : AttentionInputs {
  void* output;        // [B, H, Nq, Dv]
  float* wide_output;  // [B, H, Nq, Dv] before it is rounded to 16 bits, for the backward; nullptr: not wanted
  Strides output_strides, wide_output_strides;
  float* lse;  // [B, H, Nq] log of the softmax's denominator, -inf where a query sees nothing; nullptr: not wanted
  // [B, H, Nq] of what the backward makes the softmax again; nullptr: none will follow. lse would not do: its rounding
  // is one of exp(lse), and all that is left of it where scores are large.
  float* max;      // what is subtracted from a row's scores, in units of the kernel's own; -inf: the row sees nothing
  float* inverse;  // 1 / sum(exp(scores - max))
};

// A few queries over a cache in blocks: key j of batch b is row j % block_size of block block_table[b, j / block_size].
// key and value are [blocks, Hkv, block_size, D] and [.., Dv], the batch of their strides is a block. No batch has more
// than `keys`; shift is that of each batch, from its own number of keys.
struct PagedAttentionParams : AttentionForwardParams {
  const int32_t* block_table;    // [B, table_width]; those past the last key may be anything
  const int32_t* cache_seqlens;  // [B] keys of each batch
  int64_t table_width, block_size, blocks;
};

struct AttentionBackwardParams : AttentionInputs {
  const void* output;   // [B, H, Nq, Dv]
  DType output_dtype;   // float32 where it is the forward's wide_output
  const void* doutput;  // [B, H, Nq, Dv]
  Strides output_strides, doutput_strides;
  bool deterministic;    // the same bits on every run; else sums may be added up in any order
  const float* max;      // [B, H, Nq] as the forward left it; lse where there is no inverse
  const float* inverse;  // [B, H, Nq], nullptr: none
  const float* dlse;     // [B, H, Nq], nullptr: none
  void* dquery;          // [B, H, Nq, D], nullptr: not wanted; so for all that follow
  void* dkey;            // [B, Hkv, Nk, D]
  void* dvalue;          // [B, Hkv, Nk, Dv]
  Strides dquery_strides, dkey_strides, dvalue_strides;
  void* dbias;               // [dbias_extents] contiguous, of bias's dtype
  int64_t dbias_extents[4];  // B, H, Nq and Nk, or 1 where bias is broadcast
  float* dalibi_slopes;      // [B, H], to be summed over B where alibi_slopes is broadcast
  float* dsinks;             // [B, H], to be summed over B
};

// loss = (1 - smoothing) * (lse - logits[target]) + smoothing * (lse - mean(logits)), lse = log(sum(exp(logits))), over
// rows of V classes. A row whose target is `ignore_index` has loss 0 and no gradient.
struct CrossEntropyForwardParams {
  int64_t rows, classes, ignore_index;
  float smoothing;
  DType dtype;
  const void* logits;     // [M, V]
  const int64_t* target;  // [M]
  float* loss;            // [M]
  float* max;             // [M] of the logits
  float* sum;             // [M] of exp(logits - max)
};

struct CrossEntropyBackwardParams {
  int64_t rows, classes, ignore_index;
  float smoothing;
  DType dtype;
  const float* dloss;     // [M]
  const void* logits;     // [M, V]
  const int64_t* target;  // [M]
  const float* max;       // [M]
  const float* sum;       // [M]
  void* dlogits;          // [M, V]
};

// The losses above plus z_loss * lse^2, of logits = softcap * tanh((input @ weight^T + bias) / softcap), and the
// gradients of input, weight and bias for given gradients of the losses. softcap 0: no cap. N rows of H features, V
// classes. Rows whose target is `ignore_index` are not read; their loss and gradient are 0.
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

// output = input * Phi(input); E elements.
struct GeluForwardParams {
  int64_t numel;
  bool exact;  // Phi itself, not its tanh approximation
  DType dtype;
  const void* input;  // [E]
  void* output;       // [E]
};

struct GeluBackwardParams {
  int64_t numel;
  bool exact;
  DType dtype;
  const void* doutput;  // [E]
  const void* input;    // [E]
  void* dinput;         // [E]
};

enum class Activation : int32_t { silu, gelu, gelu_tanh };

// output = activation(gate) * up over M rows of N columns. A stride is the distance of rows, in elements.
struct GatedForwardParams {
  int64_t rows, cols;
  Activation activation;
  DType dtype;
  const void* gate;  // [M, N]
  const void* up;    // [M, N]
  int64_t gate_stride, up_stride;
  void* output;  // [M, N] contiguous
};

struct GatedBackwardParams {
  int64_t rows, cols;
  Activation activation;
  DType dtype;
  const void* doutput;  // [M, N] contiguous
  const void* gate;     // [M, N]
  const void* up;       // [M, N]
  int64_t gate_stride, up_stride;
  void* dgate;  // [M, N]
  void* dup;    // [M, N]
  int64_t dgate_stride, dup_stride;
};

// Rotates pairs (x, z) of the first R elements of a head: output = (x cos - z sin, z cos + x sin), cos and sin in row
// `position` of two tables. `inverse` rotates back. A pair is (i, i + R / 2), interleaved (2 i, 2 i + 1). A table has a
// column per element or, unless interleaved, per pair. The position of token (b, n) is position_ids[b, n], or n.
struct RotaryTensor {
  int64_t heads;          // H, 0: there is no such tensor
  const void* input;      // [B, H, N, D]
  Strides input_strides;  // along the last dimension 1
  void* output;           // [B, H, N, D], which may be the input itself
  Strides output_strides;
};

struct RotaryParams {
  int64_t batch, tokens, dim, rotary_dim;  // B, N, D, R; the last D - R elements are copied
  bool interleaved, inverse;
  DType dtype, table_dtype;  // of the tensors; of the tables: float32 or `dtype`
  RotaryTensor query, key;
  const void *cos, *sin;                       // [P, C], with batch strides [B, P, C]; C is R or R / 2
  int64_t table_rows, table_cols;              // P, C
  int64_t cos_batch_stride, sin_batch_stride;  // 0: the same for all
  const int64_t* position_ids;                 // [B, N], nullptr: n
  int64_t position_batch_stride;               // N, or 0: the same for all
};

}  // namespace torchweld
