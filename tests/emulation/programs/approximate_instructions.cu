// Approximate functions against the errors that the PTX ISA and the CUDA C++ Programming Guide ("Mathematical
// Functions") state, in units of the last place. Those that flush denormal numbers give 0 for them.
#include <cmath>

#include "cuda/ptx.cuh"
#include "harness.cuh"

namespace torchweld::cuda {
namespace {

enum class Function { exp2, reciprocal, rsqrt, exp, log, log2, normcdf };

__global__ void apply(float* out, const float* in, Function function) {
  const float x = in[threadIdx.x];
  float y = 0.0f;
  switch (function) {
    case Function::exp2:
      y = ptx::exp2(x);
      break;
    case Function::reciprocal:
      y = ptx::reciprocal(x);
      break;
    case Function::rsqrt:
      y = rsqrtf(x);
      break;
    case Function::exp:
      y = expf(x);
      break;
    case Function::log:
      y = logf(x);
      break;
    case Function::log2:
      y = log2f(x);
      break;
    case Function::normcdf:
      y = normcdff(x);
      break;
  }
  out[threadIdx.x] = y;
}

constexpr int kNumbers = 256;

std::vector<float> apply_to(Function function, const std::vector<float>& x) {
  const Buffer<float> in(x), out(std::vector<float>(x.size()));
  launch("approximate", apply, dim3(1), dim3(static_cast<unsigned>(x.size())), 0, nullptr, out.device(),
         static_cast<const float*>(in.device()), function);
  check("approximate", cudaDeviceSynchronize());
  return out.host();
}

// For numbers between two: how many units of the last place a result may be away from exact(x) as a float.
template <class F>
void test_error(const char* name, Function function, double first, double last, int ulps, F&& exact) {
  const auto x =
      table(kNumbers, [&](int i) { return static_cast<float>(first + (last - first) * (i + 0.37) / kNumbers); });
  const auto found = apply_to(function, x);
  std::vector<int> right;
  for (int i = 0; i < kNumbers; ++i) {
    const double expected = exact(double{x[i]});
    const auto magnitude = static_cast<float>(std::fabs(expected));
    const double ulp = double{std::nextafter(magnitude, INFINITY)} - magnitude;
    right.push_back(std::fabs(found[i] - expected) <= (ulps + 0.5) * ulp);
  }
  expect(name, right, std::vector<int>(kNumbers, 1));
}

}  // namespace
}  // namespace torchweld::cuda

int main() {
  using namespace torchweld::cuda;
  test_error("ex2.approx.ftz", Function::exp2, -125.0, 20.0, 2, [](double x) { return std::exp2(x); });
  test_error("rcp.approx.ftz", Function::reciprocal, 0.2, 50.0, 1, [](double x) { return 1 / x; });
  test_error("rsqrtf", Function::rsqrt, 1e-6, 30.0, 2, [](double x) { return 1 / std::sqrt(x); });
  test_error("expf", Function::exp, -80.0, 20.0, 2, [](double x) { return std::exp(x); });
  test_error("logf", Function::log, 0.01, 900.0, 1, [](double x) { return std::log(x); });
  test_error("log2f", Function::log2, 0.01, 900.0, 1, [](double x) { return std::log2(x); });
  test_error("normcdff", Function::normcdf, -5.0, 4.0, 5, [](double x) { return std::erfc(-x / std::sqrt(2.0)) / 2; });
  const float inf = INFINITY, small = 1e-39f;
  expect("ex2.approx.ftz of -inf, of what is too small, of inf", apply_to(Function::exp2, {-inf, -130.0f, inf}),
         {0.0f, 0.0f, inf});
  expect("rcp.approx.ftz of inf, of a denormal number, with a denormal result",
         apply_to(Function::reciprocal, {inf, small, -small, 2e38f}), {0.0f, inf, -inf, 0.0f});
  return wrong_instructions != 0;
}
