// gated_forward, gated_backward: tensors -> params, for any backend.
#pragma once

#include <string>

#include "bindings/tensor.h"
#include "params/activation.h"

namespace torchweld {

inline Activation activation_of(const Arguments& args, const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  args.fail("activation", "silu, gelu or gelu_tanh", name);
}

// Unpacks what both directions share. Gate and up are rows of any distance, and their columns are neighbours.
inline void fill_gated(const Arguments& args, GatedParams& p, const TensorView& gate, const TensorView& up,
                       const std::string& activation) {
  if (gate.ndim != 2) args.fail("gate", "2 dimensions", "shape " + Arguments::list(gate.shape, gate.ndim));
  p.rows = gate.size(0);
  p.cols = gate.size(1);
  p.activation = activation_of(args, activation);
  p.dtype = args.dtype(gate, "gate");
  p.gate = args.strided(gate, "gate", p.dtype, {p.rows, p.cols});
  p.up = args.strided(up, "up", p.dtype, {p.rows, p.cols});
  p.gate_stride = gate.stride(0);
  p.up_stride = up.stride(0);
}

// The distance of rows of a tensor that is to be written, where they must not overlap.
inline int64_t separate_rows(const Arguments& args, const TensorView& t, const char* name) {
  if (t.size(0) > 1 && t.stride(0) < t.size(1) && t.numel() > 0)
    args.fail(name, "rows that do not overlap", "strides " + Arguments::list(t.strides, t.ndim));
  return t.stride(0);
}

template <class Backend>
void bind_gated(Module& m) {
  m.def("gated_forward(gate, up, activation, output)",
        [](const TensorView& gate, const TensorView& up, const std::string& activation, const TensorView& output) {
          const Arguments args("gated_forward", Backend::device, gate);
          GatedForwardParams p{};
          fill_gated(args, p, gate, up, activation);
          p.output = args.flat(output, "output", p.dtype, p.rows * p.cols);
          Backend::run(&Backend::Kernels::gated_forward, p, gate.device.index);
        });

  m.def("gated_backward(doutput, gate, up, activation, dgate, dup)",
        [](const TensorView& doutput, const TensorView& gate, const TensorView& up, const std::string& activation,
           const TensorView& dgate, const TensorView& dup) {
          const Arguments args("gated_backward", Backend::device, gate);
          GatedBackwardParams p{};
          fill_gated(args, p, gate, up, activation);
          p.doutput = args.flat(doutput, "doutput", p.dtype, p.rows * p.cols);
          p.dgate = args.strided(dgate, "dgate", p.dtype, {p.rows, p.cols});
          p.dup = args.strided(dup, "dup", p.dtype, {p.rows, p.cols});
          p.dgate_stride = separate_rows(args, dgate, "dgate");
          p.dup_stride = separate_rows(args, dup, "dup");
          Backend::run(&Backend::Kernels::gated_backward, p, gate.device.index);
        });
}

}  // namespace torchweld
