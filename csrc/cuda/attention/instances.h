// The launchers of attention for one element type T and padded head size D. attention.cu chooses among them, and the
// build instantiates them from instance.cu.in.
#pragma once

#include "params/attention.h"

namespace torchweld::cuda::attention {

struct Backward;

// True if sm90/ serves this type and head size. The build defines TORCHWELD_SM90 if it compiles sm90/.
#ifdef TORCHWELD_SM90
template <class T, int D>
constexpr bool kHasSm90 = sizeof(T) == 2 && D >= 64;
#else
template <class T, int D>
constexpr bool kHasSm90 = false;
#endif

namespace sm80 {

template <class T, int D>
struct Kernels {
  static void forward(const AttentionForwardParams& p, Stream stream);
  static void paged(const PagedAttentionParams& p, Stream stream);
  static void backward(const Backward& p, Stream stream);  // dquery, dkey, dvalue
  static void backward_bias(const Backward& p, Stream stream);
};

}  // namespace sm80

namespace sm90 {

template <class T, int D>
struct Kernels {
  static void forward(const AttentionForwardParams& p, Stream stream);  // not for calls that sm80 decodes
  static void backward(const Backward& p, Stream stream);
  static void backward_bias(const Backward& p, Stream stream);
};

}  // namespace sm90
}  // namespace torchweld::cuda::attention
