// The CUDA kernels as a Python module whose functions take CPU tensors.
#include "bindings/optimizer.h"
#include "bindings/layer_norm.h"
#include "cuda/kernels.h"
#include "machine.h"

namespace {

using namespace torchweld;

struct Emulated {
  using Kernels = cuda::Kernels;
  static constexpr dlpack::DeviceType device = dlpack::kCPU;
  static constexpr bool optimizer_table = true;

  static int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int32_t) {
    return cuda::layer_norm_workspace(rows, cols, weights, 0);
  }

  template <class Params>
  static void run(void (*Kernels::*kernel)(const Params&, Stream), const Params& params, int32_t) {
    (Kernels{}.*kernel)(params, nullptr);
  }
};

}  // namespace

extern "C" void __gcov_dump() __attribute__((weak));  // there if the kernels were compiled to count their lines

PYBIND11_MODULE(emulated, m) {
  m.doc() = "CUDA kernels of torchweld, run on the CPU";
  m.def(
      "set_machine",
      [](int multiprocessors, int shared_bytes_per_block, unsigned seed) {
        emulation::machine() = {multiprocessors, shared_bytes_per_block, seed};
      },
      py::arg("multiprocessors") = 4, py::arg("shared_bytes_per_block") = 232448, py::arg("seed") = 0);
  m.def("write_coverage", [] {
    if (__gcov_dump != nullptr) __gcov_dump();
  });
  bind_optimizers<Emulated>(m);
  bind_layer_norm<Emulated>(m);
}
