// linear_cross_entropy: tensors -> params, for any backend.
#pragma once

#include "bindings/cross_entropy.h"

namespace torchweld {

// The numbers of a loss. softcap: 0 for none.
struct LossOptions {
  int64_t ignore_index = 0;
  float smoothing = 0, softcap = 0, z_loss = 0;

  static auto fields() {
    return std::tuple{Field{"ignore_index", &LossOptions::ignore_index}, Field{"smoothing", &LossOptions::smoothing},
                      Field{"softcap", &LossOptions::softcap}, Field{"z_loss", &LossOptions::z_loss}};
  }
};

template <class Backend>
void bind_linear_cross_entropy(Module& m) {
  m.def_record<LossOptions>("LossOptions");

  // input: (N, H); weight: (V, H); bias: float32 (V); target: int64 (N); dloss, loss: float32 (N); the gradients are
  // those of loss * dloss, of the shapes and dtypes of what they belong to. Without dloss none is written.
  m.def("linear_cross_entropy(input, weight, bias, target, options, dloss, loss, dinput, dweight, dbias)",
        [](const TensorView& input, const TensorView& weight, const std::optional<TensorView>& bias,
           const TensorView& target, const LossOptions& options, const std::optional<TensorView>& dloss,
           const TensorView& loss, const std::optional<TensorView>& dinput, const std::optional<TensorView>& dweight,
           const std::optional<TensorView>& dbias) {
          const Arguments args("linear_cross_entropy", Backend::device, input);
          if (input.ndim != 2) args.fail("input", "2 dimensions [rows, features]", std::to_string(input.ndim));
          if (weight.ndim != 2) args.fail("weight", "2 dimensions [classes, features]", std::to_string(weight.ndim));
          if (weight.size(0) < 1) args.fail("weight", "at least one class", "none");
          LinearCrossEntropyParams p{};
          p.rows = input.size(0);
          p.features = input.size(1);
          p.classes = weight.size(0);
          p.ignore_index = options.ignore_index;
          p.smoothing = options.smoothing;
          p.softcap = options.softcap;
          p.z_loss = options.z_loss;
          p.dtype = args.dtype(input, "input");
          p.input = args.contiguous(input, "input", p.dtype, {p.rows, p.features});
          p.weight = args.contiguous(weight, "weight", p.dtype, {p.classes, p.features});
          p.bias = static_cast<const float*>(args.flat(bias, "bias", DType::float32, p.classes));
          p.target = args.indices(target, "target", p.rows);
          if (Backend::reads_tensors) check_classes("linear_cross_entropy", p);
          p.dloss = static_cast<const float*>(args.flat(dloss, "dloss", DType::float32, p.rows));
          p.loss = static_cast<float*>(args.contiguous(loss, "loss", DType::float32, {p.rows}));
          if (!dloss && (dinput || dweight || dbias)) args.fail("dloss", "a gradient of the losses", "None");
          p.dinput = dinput ? args.contiguous(*dinput, "dinput", p.dtype, {p.rows, p.features}) : nullptr;
          p.dweight = dweight ? args.contiguous(*dweight, "dweight", p.dtype, {p.classes, p.features}) : nullptr;
          p.dbias = static_cast<float*>(args.flat(dbias, "dbias", DType::float32, p.classes));
          const Workspace workspace(input.device, Backend::kernels().linear_cross_entropy_workspace(p));
          p.workspace = workspace.data();
          Backend::run(&Backend::Kernels::linear_cross_entropy, p, input.device.index);
        });
}

}  // namespace torchweld
