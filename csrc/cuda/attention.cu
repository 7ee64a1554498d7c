// attention_forward and attention_backward: the choice among the instances, and what comes before and after them.
#include "cuda/attention_backward_rows.cuh"
#include "cuda/attention_instances.h"
#include "cuda/kernels.h"

namespace torchweld::cuda {
namespace {

// f(Tag<T>, std::integral_constant<int, D>) for the instance that serves `p`.
template <class F>
void dispatch_instance(const char* op, const AttentionInputs& p, F&& f) {
  if (p.queries > kRowLimit || p.keys > kRowLimit)
    throw std::invalid_argument("[" + std::string(op) + "] query, key: expected at most 2^30 rows, but got " +
                                std::to_string(p.queries) + " and " + std::to_string(p.keys));
  const int64_t size = p.dim > p.value_dim ? p.dim : p.value_dim;
  dispatch(op, p.dtype, [&](auto t) {
    if (size <= 32) return f(t, std::integral_constant<int, 32>{});
    if (size <= 64) return f(t, std::integral_constant<int, 64>{});
    if (size <= 128) return f(t, std::integral_constant<int, 128>{});
    if (size <= 256) return f(t, std::integral_constant<int, 256>{});
    throw std::invalid_argument("[" + std::string(op) + "] query, value: expected head sizes of at most 256, but got " +
                                std::to_string(size) + "; use torchweld.use_backend('reference')");
  });
}

int64_t rows_of(const AttentionInputs& p) { return p.batch * p.heads * p.queries; }

}  // namespace

int64_t attention_forward_workspace(const AttentionForwardParams&) { return 0; }

void attention_forward(const AttentionForwardParams& p, Stream stream) {
  if (rows_of(p) == 0) return;
  dispatch_instance("attention_forward", p, [&](auto t, auto size) {
    run_forward<typename decltype(t)::type, decltype(size)::value>(p, stream);
  });
}

int64_t attention_backward_workspace(const AttentionBackwardParams& p) { return 2 * rows_of(p); }

void attention_backward(const AttentionBackwardParams& params, Stream stream) {
  constexpr const char* kName = "attention_backward";
  if (params.batch * params.heads == 0) return;
  Backward p{params};
  p.lse2 = p.workspace;
  p.delta = p.workspace + rows_of(p);
  dispatch_instance(kName, p, [&](auto t, auto size) {
    using T = typename decltype(t)::type;
    const dim3 blocks(static_cast<unsigned>((rows_of(p) + kPrepareWarps - 1) / kPrepareWarps));
    if (rows_of(p) > 0) launch(kName, prepare<T>, blocks, dim3(kPrepareWarps * kLanes), 0, stream, p);
    run_backward<T, decltype(size)::value>(p, stream);
  });
  const dim3 heads(static_cast<unsigned>(p.batch * p.heads));
  if (p.dsinks != nullptr) launch(kName, reduce_heads, heads, dim3(kReduceThreads), kReduceThreads * sizeof(double), stream, p);
}

}  // namespace torchweld::cuda
