#include "bindings/attention.h"
#include "bindings/cross_entropy.h"
#include "bindings/dropout.h"
#include "bindings/gated.h"
#include "bindings/gelu.h"
#include "bindings/layer_norm.h"
#include "bindings/optimizer.h"
#include "bindings/paged_attention.h"
#include "bindings/rotary_embedding.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace {

using namespace torchweld;

struct Cuda {
  using Kernels = cuda::Kernels;
  static constexpr dlpack::DeviceType device = dlpack::kCUDA;
  static constexpr bool reads_tensors = false;  // a look at the values of an argument would wait for the GPU
  static Kernels kernels() { return {}; }
  static constexpr bool leaves_wide_output = false;
  static constexpr bool optimizer_table = true;

  static int64_t layer_norm_forward_workspace(int64_t rows, int64_t cols, int32_t index) {
    return cuda::layer_norm_forward_workspace(rows, cols, index);
  }

  static int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int32_t index) {
    return cuda::layer_norm_workspace(rows, cols, weights, index);
  }

  // Runs on the tensors' device, in torch's current stream of that device.
  template <class Params>
  static void run(void (*Kernels::*kernel)(const Params&, Stream), const Params& params, int32_t index) {
    Stream stream = nullptr;
    if (TorchApi::get().exchange->current_work_stream(dlpack::kCUDA, index, &stream) != 0)
      throw py::error_already_set();
    py::gil_scoped_release release;
    const cuda::DeviceGuard guard(index);
    (Kernels{}.*kernel)(params, stream);
  }
};

}  // namespace

PYBIND11_MODULE(_cuda, python, py::mod_gil_not_used()) {
  Module m(python);
  m.doc() = "CUDA kernels of torchweld";
  m.def("architectures()", &cuda::compiled_architectures, "What the kernels were compiled for, as CMake was told.");
  m.def("runtime_version()", &cuda::runtime_version, "Version of the CUDA runtime that is linked in.");
  m.def("driver_version()", &cuda::driver_version, "Newest CUDA that the driver serves, None without a driver.");
  m.def("unavailable()", &cuda::unavailable, "Why no GPU can be used here, None if one can.");
  bind_attention<Cuda>(m);
  bind_paged_attention<Cuda>(m);
  bind_optimizers<Cuda>(m);
  bind_layer_norm<Cuda>(m);
  bind_dropout<Cuda>(m);
  bind_gelu<Cuda>(m);
  bind_gated<Cuda>(m);
  bind_rotary_embedding<Cuda>(m);
  bind_cross_entropy<Cuda>(m);
}
