// The vector functions of csrc/cpu/simd, for a test that calls them on whole arrays.
#include "cpu/simd/exp.h"
using namespace torchweld::cpu;
extern "C" void functions(const float* x, float* tanh, float* log, long n) {
  for (long i = 0; i < n; i += W) store(tanh + i, vtanh(load(x + i))), store(log + i, vlog(load(x + i)));
}
extern "C" void exponential(const float* x, float* out, long n) {
  for (long i = 0; i < n; i += W) store(out + i, exp_of_negative(load(x + i)));
}
template <class T>
void stores(const float* x, T* out, long n) {  // n roundings by each of the stores
  auto value = [&](int64_t i, auto lanes) { return load(x + i, lanes); };
  for_each_vector(n, [&](int64_t i, auto lanes) { store(out + i, value(i, lanes), lanes); });
  for_each_vector(n, [&](int64_t i, auto lanes) { store_rounded(out + n + i, value(i, lanes), lanes); });
  for (int past_cache = 0; past_cache < 2; ++past_cache) {
    out += 2 * n;
    for_each_value(n, value, [&](int64_t i, auto v, auto lanes) { store_output(out + i, v, lanes, past_cache); });
    for_each_vector(n, [&](int64_t i, auto l) { store_output(out + n + i, value(i, l), l, past_cache); });
  }
}
extern "C" void bfloat16(const float* x, void* out, long n) { stores(x, static_cast<bf16*>(out), n); }
extern "C" void float16(const float* x, void* out, long n) { stores(x, static_cast<f16*>(out), n); }
