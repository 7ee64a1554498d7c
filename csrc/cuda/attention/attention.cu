// attention_forward, paged_attention and attention_backward: the choice among the instances, and what comes before and
// after them.
#include "cuda/attention/backward_rows.cuh"
#include "cuda/attention/decode.h"
#include "cuda/attention/instances.h"
#include "cuda/kernels.h"

namespace torchweld::cuda {
namespace {

// f(Tag<T>, std::integral_constant<int, D>) for the instance that serves `p`.
template <class F>
void dispatch_instance(const char* op, const AttentionInputs& p, F&& f) {
  if (p.queries > kRowLimit || p.keys > kRowLimit)
    throw std::invalid_argument("[" + std::string(op) + "] query, key: expected at most 2^29 rows, but got " +
                                std::to_string(p.queries) + " and " + std::to_string(p.keys));
  const int64_t size = p.dim > p.value_dim ? p.dim : p.value_dim;
  dispatch(op, p.dtype, [&](auto t) {
    if constexpr (sizeof(typename decltype(t)::type) == 2)
      if (size <= 32) return f(t, std::integral_constant<int, 32>{});
    if (size <= 64) return f(t, std::integral_constant<int, 64>{});
    if (size <= 128) return f(t, std::integral_constant<int, 128>{});
    if (size <= 256) return f(t, std::integral_constant<int, 256>{});
    throw std::invalid_argument("[" + std::string(op) + "] query, value: expected head sizes of at most 256, but got " +
                                std::to_string(size) + "; use torchweld.use_backend('reference')");
  });
}

// Whether this GPU runs the kernels for Hopper, where there are any.
bool is_hopper() { return compute_capability(current_device()) == 90; }

}  // namespace

int64_t attention_forward_workspace(const AttentionForwardParams& p) { return decodes(p) ? decode_workspace(p) : 0; }

void attention_forward(const AttentionForwardParams& p, Stream stream) {
  if (query_rows(p) == 0) return;
  dispatch_instance("attention_forward", p, [&](auto t, auto size) {
    using T = typename decltype(t)::type;
    constexpr int D = decltype(size)::value;
    if constexpr (kHasSm90<T, D>)
      if (!decodes(p) && is_hopper()) return run_forward_sm90<T, D>(p, stream);
    run_forward<T, D>(p, stream);
  });
}

int64_t paged_attention_workspace(const PagedAttentionParams& p) { return decode_workspace(p); }

void paged_attention(const PagedAttentionParams& p, Stream stream) {
  if (query_rows(p) == 0) return;
  dispatch_instance("paged_attention", p, [&](auto t, auto size) {
    run_paged<typename decltype(t)::type, decltype(size)::value>(p, stream);
  });
}

int64_t attention_backward_workspace(const AttentionBackwardParams& p) {
  const bool sums = !p.deterministic && p.dtype != DType::float32;
  return (6 + (sums ? Backward{p}.sum_width() : 0)) * query_rows(p);
}

void attention_backward(const AttentionBackwardParams& params, Stream stream) {
  constexpr const char* kName = "attention_backward";
  const int64_t rows = query_rows(params);
  Backward p{params};
  p.unit = unit_of(p, is_plain(p));
  float* next = p.workspace;
  auto take = [&](int64_t width) { return next += width * rows, next - width * rows; };
  p.softmax = reinterpret_cast<float2*>(take(2));
  p.gradient = reinterpret_cast<float2*>(take(2));
  p.dquery_sum = adds_up(p) ? take(p.sum_width()) : nullptr;
  p.distances = p.dalibi_slopes != nullptr ? take(1) : nullptr;
  p.sinks_of_rows = p.dsinks != nullptr ? take(1) : nullptr;
  dispatch_instance(kName, p, [&](auto t, auto size) {
    using T = typename decltype(t)::type;
    constexpr int D = decltype(size)::value;
    auto run = run_backward<T, D>, run_bias = run_bias_backward<T, D>;
    if constexpr (kHasSm90<T, D>)
      if (is_hopper()) {
        run = run_backward_sm90<T, D>;
        run_bias = run_bias_backward_sm90<T, D>;
        if (D > 128) p.dquery_sum = nullptr;  // it would not fit shared memory
      }
    const dim3 blocks = grid_of(kName, (rows + kPrepareWarps - 1) / kPrepareWarps);
    if (rows > 0) launch(kName, prepare<T>, blocks, dim3(kPrepareWarps * kLanes), 0, stream, p);
    if (p.batch * p.heads > 0) run(p, stream);
    if (p.dbias != nullptr) run_bias(p, stream);
    if (rows > 0 && p.dquery_sum != nullptr)
      launch(kName, round_queries<T>, blocks, dim3(kPrepareWarps * kLanes), 0, stream, p);
  });
  const dim3 heads = grid_of(kName, p.batch * p.heads);
  if (heads.x > 0 && (p.dsinks != nullptr || p.dalibi_slopes != nullptr))
    launch(kName, reduce_heads, heads, dim3(kReduceThreads), kReduceThreads * sizeof(double), stream, p);
}

}  // namespace torchweld::cuda
