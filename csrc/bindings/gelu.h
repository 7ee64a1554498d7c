// gelu_forward, gelu_backward: tensors -> params, for any backend.
#pragma once

#include "bindings/tensor.h"
#include "params/activation.h"

namespace torchweld {

// Unpacks what both directions share.
inline void fill_gelu(const Arguments& args, GeluParams& p, const TensorView& input, bool exact) {
  p.numel = input.numel();
  p.exact = exact;
  p.dtype = args.dtype(input, "input");
  p.input = args.flat(input, "input", p.dtype, p.numel);
}

template <class Backend>
void bind_gelu(Module& m) {
  m.def("gelu_forward(input, exact, output)", [](const TensorView& input, bool exact, const TensorView& output) {
    const Arguments args("gelu_forward", Backend::device, input);
    GeluForwardParams p{};
    fill_gelu(args, p, input, exact);
    p.output = args.flat(output, "output", p.dtype, p.numel);
    Backend::run(&Backend::Kernels::gelu_forward, p, input.device.index);
  });

  m.def("gelu_backward(doutput, input, exact, dinput)",
        [](const TensorView& doutput, const TensorView& input, bool exact, const TensorView& dinput) {
          const Arguments args("gelu_backward", Backend::device, input);
          GeluBackwardParams p{};
          fill_gelu(args, p, input, exact);
          p.doutput = args.flat(doutput, "doutput", p.dtype, p.numel);
          p.dinput = args.flat(dinput, "dinput", p.dtype, p.numel);
          Backend::run(&Backend::Kernels::gelu_backward, p, input.device.index);
        });
}

}  // namespace torchweld
