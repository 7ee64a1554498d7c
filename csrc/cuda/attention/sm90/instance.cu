// The attention kernels of one type and head size that use Hopper's own instructions: as sm80/instance.cu, for
// sm_90a alone.
#include "cuda/attention/instances.h"
#include "cuda/attention/sm90/backward_bias.cuh"
#include "cuda/attention/sm90/backward_keys.cuh"
#include "cuda/attention/sm90/backward_queries.cuh"
#include "cuda/attention/sm90/forward.cuh"

namespace torchweld::cuda {

template <class T, int D>
void run_forward_sm90(const AttentionForwardParams& p, Stream stream) {
  is_plain(p) ? launch_forward_sm90<T, D, true>(p, stream) : launch_forward_sm90<T, D, false>(p, stream);
}

template <class T, int D>
void run_backward_sm90(const Backward& p, Stream stream) {
  is_plain(p) ? launch_keys_sm90<T, D, true>(p, stream) : launch_keys_sm90<T, D, false>(p, stream);
  if (p.dquery_sum == nullptr)
    is_plain(p) ? launch_queries_sm90<T, D, true>(p, stream) : launch_queries_sm90<T, D, false>(p, stream);
}

template <class T, int D>
void run_bias_backward_sm90(const Backward& p, Stream stream) {
  launch_bias_sm90<T, D>(p, stream);
}

template void run_forward_sm90<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>(const AttentionForwardParams& p, Stream stream);
template void run_backward_sm90<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>(const Backward& p, Stream stream);
template void run_bias_backward_sm90<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>(const Backward& p, Stream stream);

}  // namespace torchweld::cuda
