// The attention kernels of one type and padded head size: attention_instance.cu makes them, attention.cu chooses.
#pragma once

#include "params.h"

namespace torchweld::cuda {

struct Backward;

template <class T, int D>
void run_forward(const AttentionForwardParams& p, Stream stream);

template <class T, int D>
void run_paged(const PagedAttentionParams& p, Stream stream);

// Gradients of queries, keys, values and bias.
template <class T, int D>
void run_backward(const Backward& p, Stream stream);

}  // namespace torchweld::cuda
