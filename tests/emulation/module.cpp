// The CUDA kernels as a Python module whose functions take CPU tensors.
#include "bindings/attention.h"
#include "bindings/cross_entropy.h"
#include "bindings/dropout.h"
#include "bindings/gated.h"
#include "bindings/gelu.h"
#include "bindings/layer_norm.h"
#include "bindings/optimizer.h"
#include "bindings/paged_attention.h"
#include "bindings/rotary_embedding.h"
#include "cuda/kernels.h"
#include "machine.h"
#include "products.h"

namespace {

using namespace torchweld;

struct Emulated {
  using Kernels = cuda::Kernels;
  static constexpr dlpack::DeviceType device = dlpack::kCPU;
  static constexpr bool reads_tensors = false;  // as on a GPU
  static Kernels kernels() { return {}; }
  static constexpr bool leaves_wide_output = false;
  static constexpr bool optimizer_table = true;

  static int64_t layer_norm_forward_workspace(int64_t rows, int64_t cols, int32_t) {
    return cuda::layer_norm_forward_workspace(rows, cols, 0);
  }

  static int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int32_t) {
    return cuda::layer_norm_workspace(rows, cols, weights, 0);
  }

  template <class Params>
  static void run(void (*Kernels::*kernel)(const Params&, Stream), const Params& params, int32_t) {
    (Kernels{}.*kernel)(params, nullptr);
  }
};

}  // namespace

extern "C" void __gcov_dump() __attribute__((weak));  // exists if the kernels count their lines

PYBIND11_MODULE(emulated, python) {
  Module m(python);
  m.doc() = "CUDA kernels of torchweld, run on the CPU";
  python.def(
      "set_machine",
      [](int multiprocessors, int shared_bytes_per_block, int capability, unsigned seed, unsigned rounding) {
        emulation::machine() = {multiprocessors, shared_bytes_per_block, capability, seed, rounding};
      },
      py::arg("multiprocessors") = 4, py::arg("shared_bytes_per_block") = 232448, py::arg("capability") = 80,
      py::arg("seed") = 0, py::arg("rounding") = 0);
  m.def("write_coverage()", [] {
    if (__gcov_dump != nullptr) __gcov_dump();
  });
  m.def("products(a, b, rows, vectorized, padded, inner, outer)", [](const TensorView& a, const TensorView& b, int rows,
                                                                     bool vectorized, int padded,
                                                                     const TensorView& inner, const TensorView& outer) {
    const Arguments args("products", Emulated::device, a);
    const DType dtype = args.dtype(a, "a");
    emulation::products({args.strided(a, "a", dtype, {16, a.size(1)}), args.strided(b, "b", dtype, {16, a.size(1)}),
                         a.stride(0), static_cast<int>(a.size(1)), padded, rows, vectorized,
                         static_cast<float*>(args.flat(inner, "inner", DType::float32, 256)),
                         static_cast<float*>(args.flat(outer, "outer", DType::float32, 16 * a.size(1)))},
                        dtype);
  });
  bind_attention<Emulated>(m);
  bind_paged_attention<Emulated>(m);
  bind_optimizers<Emulated>(m);
  bind_layer_norm<Emulated>(m);
  bind_dropout<Emulated>(m);
  bind_gelu<Emulated>(m);
  bind_gated<Emulated>(m);
  bind_rotary_embedding<Emulated>(m);
  bind_cross_entropy<Emulated>(m);
}
