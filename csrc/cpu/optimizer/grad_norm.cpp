// The norm of a list of gradients, which are read once. There are kGradNormBlocks sums over fixed stretches. They are
// added in order, in double.

#include "cpu/isa/kernels.h"
#include "cpu/optimizer/optimizer.h"

namespace torchweld::cpu {
namespace {

// Four streams, a quarter of the stretch apart: a core keeps too few lines of one stream in flight (9 GB/s against 13
// where it was measured). Chains of 64 additions keep rounding small.
template <class GT>
float sum_of_squares(const GT* grad, int64_t n) {
  constexpr int64_t kChain = 64 * W;
  const int64_t quarter = n / (4 * W) * W;
  Vec total{};
  for (int64_t i = 0; i < quarter;) {
    Vec sums[4] = {};
    for (const int64_t end = min_of(i + kChain, quarter); i < end; i += W) {
      for (int k = 0; k < 4; ++k) {
        const Vec g = load(grad + k * quarter + i);
        sums[k] += g * g;
      }
    }
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  const GT* rest = grad + 4 * quarter;
  return sum(total) + sum_over(n - 4 * quarter, [&](int64_t i, auto lanes) {
           const Vec g = load(rest + i, lanes);
           return g * g;
         });
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void grad_norm(const GradNormParams& p) {
  const int64_t chunks = p.total / kOptimizerChunkCpu, blocks = min_of(chunks, kGradNormBlocks);
  parallel_for(blocks, grain(p.total, blocks), [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      double squares = 0;
      for_each_stretch(p.tensors, p.count, chunks * b / blocks, chunks * (b + 1) / blocks,
                       [&](int64_t i, int64_t begin, int64_t end) {
                         const OptimizerTensor& t = p.tensors[i];
                         dispatch(t.grad_dtype, [&](auto tag) {
                           squares += sum_of_squares(at<typename decltype(tag)::type>(t.grad, begin), end - begin);
                         });
                       });
      p.partial[b] = squares;
    }
  });
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += p.partial[b];
  *p.norm =
      static_cast<float>(__builtin_sqrt(total) / (p.grad_scale != nullptr ? __builtin_fabsf(*p.grad_scale) : 1.0f));
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
