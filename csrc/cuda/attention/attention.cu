// The ops attention_forward, paged_attention and attention_backward: they choose an instance and launch its kernels.
#include "cuda/attention/backward_rows.cuh"
#include "cuda/attention/decode.h"
#include "cuda/attention/instances.h"
#include "cuda/kernels.h"

namespace torchweld::cuda::attention {
namespace {

// Calls f(Tag<T>, std::integral_constant<int, D>) with the element type and padded head size that serve `p`.
template <class F>
void dispatch_instance(const char* op, const AttentionInputs& p, F&& f) {
  if (p.queries > kMaxRows || p.keys > kMaxRows)
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

// True if this GPU can run the kernels of sm90/.
bool is_hopper() { return compute_capability(current_device()) == 90; }

}  // namespace
}  // namespace torchweld::cuda::attention

namespace torchweld::cuda {

int64_t attention_forward_workspace(const AttentionForwardParams& p) {
  return attention::decodes(p) ? attention::decode_workspace(p) : 0;
}

void attention_forward(const AttentionForwardParams& p, Stream stream) {
  using namespace attention;
  if (query_rows(p) == 0) return;
  dispatch_instance("attention_forward", p, [&](auto t, auto size) {
    using T = typename decltype(t)::type;
    constexpr int D = decltype(size)::value;
    if constexpr (kHasSm90<T, D>)
      if (!decodes(p) && is_hopper()) return sm90::Kernels<T, D>::forward(p, stream);
    sm80::Kernels<T, D>::forward(p, stream);
  });
}

int64_t paged_attention_workspace(const PagedAttentionParams& p) { return attention::decode_workspace(p); }

void paged_attention(const PagedAttentionParams& p, Stream stream) {
  using namespace attention;
  if (query_rows(p) == 0) return;
  dispatch_instance("paged_attention", p, [&](auto t, auto size) {
    sm80::Kernels<typename decltype(t)::type, decltype(size)::value>::paged(p, stream);
  });
}

int64_t attention_backward_workspace(const AttentionBackwardParams& p) {
  using namespace attention;
  const bool sums = !p.deterministic && p.dtype != DType::float32;
  return (6 + (sums ? Backward{p}.accumulator_width() : 0)) * query_rows(p);
}

void attention_backward(const AttentionBackwardParams& params, Stream stream) {
  using namespace attention;
  constexpr const char* kName = "attention_backward";
  const int64_t rows = query_rows(params);
  Backward p{params};
  p.scale_log2 = scale_log2_of(p, is_plain(p));
  float* next = p.workspace;
  auto take = [&](int64_t width) { return next += width * rows, next - width * rows; };
  p.softmax_statistics = reinterpret_cast<float2*>(take(2));
  p.gradient_statistics = reinterpret_cast<float2*>(take(2));
  p.dquery_accumulator = uses_atomic_dquery(p) ? take(p.accumulator_width()) : nullptr;
  p.row_dslopes = p.dalibi_slopes != nullptr ? take(1) : nullptr;
  p.row_dsinks = p.dsinks != nullptr ? take(1) : nullptr;
  dispatch_instance(kName, p, [&](auto t, auto size) {
    using T = typename decltype(t)::type;
    constexpr int D = decltype(size)::value;
    auto run = sm80::Kernels<T, D>::backward, run_bias = sm80::Kernels<T, D>::backward_bias;
    if constexpr (kHasSm90<T, D>)
      if (is_hopper()) {
        run = sm90::Kernels<T, D>::backward;
        run_bias = sm90::Kernels<T, D>::backward_bias;
        if (D > 128) p.dquery_accumulator = nullptr;  // dS does not fit shared memory
      }
    launch_prepare<T, D>(kName, p, stream);
    if (p.batch * p.heads > 0) run(p, stream);
    if (p.dbias != nullptr) run_bias(p, stream);
    if constexpr (sizeof(T) == 2) launch_round<T, D>(kName, p, stream);
  });
  const dim3 heads = grid_of(kName, p.batch * p.heads);
  if (heads.x > 0 && (p.dsinks != nullptr || p.dalibi_slopes != nullptr))
    launch(kName, reduce_heads, heads, dim3(kReduceThreads), kReduceThreads * sizeof(double), stream, p);
}

}  // namespace torchweld::cuda
