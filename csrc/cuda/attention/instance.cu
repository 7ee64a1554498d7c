// The kernels of one family, element type and head size. The build compiles this file once for each combination;
// TORCHWELD_FAMILY is 80 or 90.
#if TORCHWELD_FAMILY == 90
  #include "cuda/attention/sm90/kernels.cuh"
template struct torchweld::cuda::attention::sm90::Kernels<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>;
#else
  #include "cuda/attention/sm80/kernels.cuh"
template struct torchweld::cuda::attention::sm80::Kernels<TORCHWELD_DTYPE, TORCHWELD_HEAD_SIZE>;
#endif
