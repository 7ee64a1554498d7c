// The CUDA kernels as a Python module whose functions take CPU tensors.
#include "bindings/adamw.h"
#include "bindings/attention.h"
#include "bindings/layer_norm.h"
#include "cuda/kernels.h"
#include "machine.h"
#include "products.h"

namespace {

using namespace torchweld;

struct Emulated {
  using Kernels = cuda::Kernels;
  static constexpr dlpack::DeviceType device = dlpack::kCPU;
  static constexpr bool adamw_table = true;
  static Kernels kernels() { return {}; }

  static int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int32_t) {
    return cuda::layer_norm_workspace(rows, cols, weights, 0);
  }

  template <class Params>
  static void run(void (*Kernels::*kernel)(const Params&, Stream), const Params& params, int32_t) {
    (Kernels{}.*kernel)(params, nullptr);
  }
};

}  // namespace

PYBIND11_MODULE(emulated, m) {
  m.doc() = "CUDA kernels of torchweld, run on the CPU";
  m.def("set_machine", [](int multiprocessors, int shared_bytes_per_block, unsigned seed) {
    emulation::machine() = {multiprocessors, shared_bytes_per_block, seed};
  });
  m.def("products", &emulation::products);
  bind_adamw<Emulated>(m);
  bind_attention<Emulated>(m);
  bind_layer_norm<Emulated>(m);
}
