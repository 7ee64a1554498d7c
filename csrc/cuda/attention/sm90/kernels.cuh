// The launchers of the kernels on wgmma, for sm_90a alone: which kernels a call runs.
#pragma once

#include "cuda/attention/instances.h"
#include "cuda/attention/sm90/backward_bias.cuh"
#include "cuda/attention/sm90/backward_keys.cuh"
#include "cuda/attention/sm90/backward_queries.cuh"
#include "cuda/attention/sm90/forward.cuh"

namespace torchweld::cuda::attention::sm90 {

template <class T, int D>
void Kernels<T, D>::forward(const AttentionForwardParams& p, Stream stream) {
  is_plain(p) ? launch_forward<T, D, true>(p, stream) : launch_forward<T, D, false>(p, stream);
}

template <class T, int D>
void Kernels<T, D>::backward(const Backward& p, Stream stream) {
  is_plain(p) ? launch_keys<T, D, true>(p, stream) : launch_keys<T, D, false>(p, stream);
  if (p.dquery_accumulator == nullptr)
    is_plain(p) ? launch_queries<T, D, true>(p, stream) : launch_queries<T, D, false>(p, stream);
}

template <class T, int D>
void Kernels<T, D>::backward_bias(const Backward& p, Stream stream) {
  launch_bias<T, D>(p, stream);
}

}  // namespace torchweld::cuda::attention::sm90
