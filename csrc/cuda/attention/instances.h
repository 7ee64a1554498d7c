// The attention kernels of one type and padded head size: sm80/instance.cu makes them, attention.cu chooses.
#pragma once

#include "params.h"

namespace torchweld::cuda {

struct Backward;

// Which types and head sizes have kernels with Hopper's own instructions, run_*_sm90 below: where they were compiled.
#ifdef TORCHWELD_SM90
template <class T, int D>
constexpr bool kHasSm90 = sizeof(T) == 2 && D >= 64;
#else
template <class T, int D>
constexpr bool kHasSm90 = false;
#endif

template <class T, int D>
void run_forward(const AttentionForwardParams& p, Stream stream);

template <class T, int D>
void run_paged(const PagedAttentionParams& p, Stream stream);

// Gradients of queries, keys and values.
template <class T, int D>
void run_backward(const Backward& p, Stream stream);

template <class T, int D>
void run_bias_backward(const Backward& p, Stream stream);

// The same on Hopper; not what `decodes`.
template <class T, int D>
void run_forward_sm90(const AttentionForwardParams& p, Stream stream);
template <class T, int D>
void run_backward_sm90(const Backward& p, Stream stream);
template <class T, int D>
void run_bias_backward_sm90(const Backward& p, Stream stream);

}  // namespace torchweld::cuda
