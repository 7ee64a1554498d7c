// dropout: tensors -> params, for any backend.
#pragma once

#include "bindings/tensor.h"
#include "params/activation.h"

namespace torchweld {

template <class Backend>
void bind_dropout(Module& m) {
  m.def("dropout(input, seed, p, output)",
        [](const TensorView& input, const TensorView& seed, double p, const TensorView& output) {
          const Arguments args("dropout", Backend::device, input);
          DropoutParams params{};
          params.cols = input.ndim > 0 ? input.shape[input.ndim - 1] : 1;
          params.rows = params.cols > 0 ? input.numel() / params.cols : 0;
          params.dtype = args.dtype(input, "input");
          params.input = args.flat(input, "input", params.dtype, input.numel());
          if (!(p >= 0 && p <= 1)) args.fail("p", "a probability from 0 to 1", std::to_string(p));
          params.dropout = make_dropout(args.indices(seed, "seed", 1), p);
          params.output = args.flat(output, "output", params.dtype, input.numel());
          Backend::run(&Backend::Kernels::dropout, params, input.device.index);
        });
}

}  // namespace torchweld
