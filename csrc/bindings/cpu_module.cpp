#include "bindings/adamw.h"
#include "bindings/attention.h"
#include "bindings/layer_norm.h"
#include "cpu/isa.h"

namespace {

using namespace torchweld;

struct Cpu {
  using Kernels = cpu::Kernels;
  static constexpr dlpack::DeviceType device = dlpack::kCPU;

  static const Kernels& kernels() { return cpu::kernels(); }

  template <class Params>
  static void run(void (*Kernels::*kernel)(const Params&), const Params& params, int32_t) {
    const Kernels& table = cpu::kernels();
    py::gil_scoped_release release;
    (table.*kernel)(params);
  }
};

}  // namespace

PYBIND11_MODULE(_cpu, m, py::mod_gil_not_used()) {
  m.doc() = "CPU kernels of torchweld";
  m.def("isa", [] { return cpu::kernels().isa; }, "Name of the instruction set in use.");
  m.def("use_isa", &cpu::use_isa, py::arg("name"), "Switches to another instruction set.");
  m.def("built_isas", &cpu::built_isas, "Instruction sets that the kernels are built for, best first.");
  m.def("available_isas", &cpu::available_isas, "Instruction sets that this CPU has, best first.");
  bind_attention<Cpu>(m);
  bind_layer_norm<Cpu>(m);
  bind_adamw<Cpu>(m);
}
