#include <algorithm>

#include "bindings/attention.h"
#include "bindings/cross_entropy.h"
#include "bindings/dropout.h"
#include "bindings/gated.h"
#include "bindings/gelu.h"
#include "bindings/layer_norm.h"
#include "bindings/linear_cross_entropy.h"
#include "bindings/node.h"
#include "bindings/node_attention.h"
#include "bindings/optimizer.h"
#include "bindings/paged_attention.h"
#include "bindings/rotary_embedding.h"
#include "bindings/whole_attention.h"
#include "bindings/whole_call.h"
#include "bindings/whole_step.h"
#include "cpu/isa/isa.h"

namespace {

using namespace torchweld;

struct Cpu {
  using Kernels = cpu::Kernels;
  static constexpr dlpack::DeviceType device = dlpack::kCPU;
  static constexpr bool reads_tensors = true;       // the bindings can check the values of an argument
  static constexpr bool leaves_wide_output = true;  // attention's backward reads the output before its rounding
  static constexpr bool optimizer_table = false;

  static const Kernels& kernels() { return cpu::kernels(); }

  static int64_t layer_norm_forward_workspace(int64_t, int64_t, int32_t) { return 0; }

  // One block for every 8 rows, up to 64 of them or 4 million columns.
  static int64_t layer_norm_workspace(int64_t rows, int64_t cols, bool weights, int32_t) {
    return weights ? std::max<int64_t>(1, std::min<int64_t>({64, rows / 8, (1 << 22) / cols})) : 0;
  }

  template <class Params>
  static void run(void (*Kernels::*kernel)(const Params&), const Params& params, int32_t) {
    const Kernels& table = cpu::kernels();
    py::gil_scoped_release release;
    (table.*kernel)(params);
  }
};

}  // namespace

PYBIND11_MODULE(_cpu, python, py::mod_gil_not_used()) {
  Module m(python);
  m.doc() = "CPU kernels of torchweld";
  m.def("isa()", []() -> std::string { return cpu::kernels().isa; }, "Name of the instruction set in use.");
  m.def("use_isa(name)", &cpu::use_isa, "Switches to another instruction set.");
  m.def("built_isas()", &cpu::built_isas, "Instruction sets that the kernels are built for, best first.");
  m.def("available_isas()", &cpu::available_isas, "Instruction sets that this CPU has, best first.");
  bind_cross_entropy<Cpu>(m);
  bind_dropout<Cpu>(m);
  bind_gelu<Cpu>(m);
  bind_gated<Cpu>(m);
  bind_rotary_embedding<Cpu>(m);
  bind_attention<Cpu>(m);
  bind_paged_attention<Cpu>(m);
  bind_layer_norm<Cpu>(m);
  bind_linear_cross_entropy<Cpu>(m);
  bind_optimizers<Cpu>(m);
  bind_whole_calls<Cpu>(m);
  bind_whole_attention<Cpu>(m);
  bind_nodes<Cpu>(m);
  bind_node_attention<Cpu>(m);
  bind_whole_steps<Cpu>(m);
}
