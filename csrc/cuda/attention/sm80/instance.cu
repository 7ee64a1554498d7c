// The attention kernels of one type and head size: compiled once for each TORCHWELD_DTYPE and TORCHWELD_HEAD_SIZE that
// CMakeLists.txt lists.
#include "cuda/attention/sm80/backward_bias.cuh"
#include "cuda/attention/sm80/backward_keys.cuh"
#include "cuda/attention/sm80/decode.cuh"

namespace torchweld::cuda {

template <class T, int D>
void run_forward(const AttentionForwardParams& p, Stream stream) {
  if (decodes(p)) return launch_decode<T, D, false>({p}, stream);
  is_plain(p) ? launch_forward<T, D, true>(p, stream) : launch_forward<T, D, false>(p, stream);
}

template <class T, int D>
void run_paged(const PagedAttentionParams& p, Stream stream) {
  launch_decode<T, D, true>(p, stream);
}

template <class T, int D>
void run_backward(const Backward& p, Stream stream) {
  is_plain(p) ? launch_keys<T, D, true>(p, stream) : launch_keys<T, D, false>(p, stream);
  if (p.dquery_sum == nullptr)
    is_plain(p) ? launch_queries<T, D, true>(p, stream) : launch_queries<T, D, false>(p, stream);
}

template <class T, int D>
void run_bias_backward(const Backward& p, Stream stream) {
  launch_bias<T, D>(p, stream);
}

template void run_forward<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>(const AttentionForwardParams& p, Stream stream);
template void run_paged<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>(const PagedAttentionParams& p, Stream stream);
template void run_backward<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>(const Backward& p, Stream stream);
template void run_bias_backward<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>(const Backward& p, Stream stream);

}  // namespace torchweld::cuda
