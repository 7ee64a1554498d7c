// Layer norm and RMS norm, forward, with or without a residual add in front.
//
//   s = input, or residual + dropout(input)     xhat = (s - mean(s)) * rstd     output = xhat * weight + bias
//
// RMS norm has mean = 0. weight stands for weight + weight_offset.
//
// - forward_rows (N <= 16384): the lanes of a row hold it in registers, so memory is read and written once: 2 values
// per
//   element, 4 with a residual. Up to 256 columns a row has a part of a warp and 8 columns per lane, above that whole
//   warps and 32 columns per lane. Grid -> groups of blockDim.y rows.
// - forward_long_rows: one block per row, tile by tile. The passes for variance and output read the row again, from L2
// as
//   far as it fits. Rows of N > 8192 that cannot be accessed 16 bytes at a time go here too.
// - statistics_of_slabs, normalise_slabs: few long rows do not fill the device, so they are cut into slabs of 16384
//   columns. The first kernel stores each slab's mean and the sums about it; every block of the second combines those
//   of its row in one order. 3 values per element, less what L2 holds: the second kernel goes backwards.
//
// The variance is computed about the mean (two passes, no cancellation), and the second pass also sums the error of the
// mean. Statistics are fp32, and sums have one fixed order. Ba, Kiros, Hinton: Layer Normalization, arXiv:1607.06450.
// Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv:1910.07467. Chan, Golub, LeVeque: Updating Formulae and
// a Pairwise Algorithm for Computing Sample Variances.

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/norm/forward.cuh"

namespace torchweld::cuda::norm {
namespace {

constexpr const char* kName = "layer_norm_forward";
template <int V>
dim3 block_for(int64_t cols) {
  if (cols > kLongestRow<V>) return dim3(kMaxThreads);
  if (cols <= kShortRow) {
    const int lanes = lanes_for(cols, kShortSlice);
    return dim3(lanes, kShortThreads / lanes);
  }
  const int lanes = std::max(kWarpSize, lanes_for(cols, kSlice<V>));
  return dim3(lanes, lanes == kWarpSize ? kWarpRowThreads / kWarpSize : 1);
}

// How many slabs each of `rows` long rows is cut into. 1 where there are enough rows to fill the device.
template <int V>
int64_t slabs_of(int64_t rows, int64_t cols, int device) {
  const bool cut = cols > kLongestRow<V> && rows < kFewRows * multiprocessors(device);
  return cut ? (cols + kLongestRow<V> - 1) / kLongestRow<V> : 1;
}

}  // namespace
}  // namespace torchweld::cuda::norm

namespace torchweld::cuda {

int64_t layer_norm_forward_workspace(int64_t rows, int64_t cols, int device) {
  using namespace norm;
  const int64_t slabs = slabs_of<1>(rows, cols, device);  // single elements need the most
  return slabs > 1 ? 3 * rows * slabs : 0;
}

void layer_norm_forward(const LayerNormForwardParams& params, Stream stream) {
  using namespace norm;
  if (params.rows == 0) return;
  const LayerNormForwardParams p = with_defaults(params);
  dispatch_norm(kName, p, [&](auto t, auto r) {
    using T = typename decltype(t)::type;
    using R = typename decltype(r)::type;
    const bool vectorized = can_vectorize<T>(p.cols, p.input, p.residual, p.weight, p.bias, p.sum, p.output);
    dispatch_width<T>(vectorized, [&](auto width) {
      constexpr int V = decltype(width)::value;
      const dim3 block = block_for<V>(p.cols);
      const size_t shared = RowSums<2>::floats(block.x * block.y) * sizeof(float);
      const int64_t slabs = slabs_of<V>(p.rows, p.cols, current_device());
      if (slabs > 1) {
        if (p.workspace_size < 3 * p.rows * slabs)
          throw std::invalid_argument(std::string("[") + kName + "] workspace: expected at least " +
                                      std::to_string(3 * p.rows * slabs) + " elements, but got " +
                                      std::to_string(p.workspace_size));
        const dim3 grid(static_cast<unsigned>(slabs), static_cast<unsigned>(p.rows));
        launch(kName, statistics_of_slabs<T, R, V>, grid, block, shared, stream, p);
        launch(kName, normalise_slabs<T, R, V>, grid, block, shared, stream, p);
        return;
      }
      auto* kernel = p.cols <= kShortRow        ? forward_rows<T, R, kShortSlice, V>
                     : p.cols <= kLongestRow<V> ? forward_rows<T, R, kSlice<V>, V>
                                                : forward_long_rows<T, R, V>;
      const int64_t groups = (p.rows + block.y - 1) / block.y;
      const dim3 grid(static_cast<unsigned>(groups < INT32_MAX ? groups : INT32_MAX));
      launch(kName, kernel, grid, block, shared, stream, p);
    });
  });
}

}  // namespace torchweld::cuda
