// layer_norm_forward, layer_norm_backward: tensors -> params, for any backend.
#pragma once

#include "bindings/tensor.h"

namespace torchweld {

// Weight, bias and their gradients share one dtype: that of the activations, or float32.
inline DType parameter_dtype(const Arguments& args, DType dtype, const std::optional<TensorView>& a,
                             const std::optional<TensorView>& b) {
  const DType found = a ? args.dtype(*a, "weight") : b ? args.dtype(*b, "bias") : dtype;
  if (found != dtype && found != DType::float32)
    args.fail("weight", std::string("dtype float32 or ") + name_of(dtype), name_of(found));
  return found;
}

template <class Backend>
void bind_layer_norm(py::module_& m) {
  using Optional = std::optional<TensorView>;

  // input, residual, sum, output: M * N elements of one dtype; weight, bias: N; stats: float32, (2, M), mean and rstd,
  // if centred, else (1, M), rstd alone; or None.
  m.def("layer_norm_forward",
        [](const TensorView& input, const Optional& residual, int64_t cols, const Optional& weight,
           const Optional& bias, float eps, bool centred, float weight_offset, const Optional& sum,
           const TensorView& output, const Optional& stats) {
          const Arguments args("layer_norm_forward", Backend::device, input);
          if (cols < 1) args.fail("cols", "at least 1", std::to_string(cols));
          if (residual.has_value() != sum.has_value()) args.fail("sum", "a tensor if there is a residual", "the other");
          const int64_t numel = input.numel(), rows = numel / cols;
          LayerNormForwardParams p{};
          p.rows = rows;
          p.cols = cols;
          p.eps = eps;
          p.centred = centred;
          p.weight_offset = weight_offset;
          p.dtype = args.dtype(input, "input");
          p.weight_dtype = parameter_dtype(args, p.dtype, weight, bias);
          p.input = args.flat(input, "input", p.dtype, rows * cols);
          p.residual = args.flat(residual, "residual", p.dtype, numel);
          p.weight = args.flat(weight, "weight", p.weight_dtype, cols);
          p.bias = args.flat(bias, "bias", p.weight_dtype, cols);
          p.sum = args.flat(sum, "sum", p.dtype, numel);
          p.output = args.flat(output, "output", p.dtype, numel);
          if (stats) {
            auto* found = static_cast<float*>(args.contiguous(*stats, "stats", DType::float32, {1 + centred, rows}));
            p.mean = centred ? found : nullptr;
            p.rstd = centred ? found + rows : found;
          }
          Backend::run(&Backend::Kernels::layer_norm_forward, p, input.device.index);
        });

  // How many blocks the workspace of layer_norm_backward takes on the device with this index: a function of the shape
  // and of the device, never of the load, so that results are too. 0: none.
  m.def("layer_norm_workspace", &Backend::layer_norm_workspace, py::arg("rows"), py::arg("cols"), py::arg("weights"),
        py::arg("device"));

  // As above; partial: float32 (blocks, 2, N), the workspace.
  m.def("layer_norm_backward",
        [](const TensorView& doutput, const Optional& dsum, const TensorView& input, int64_t cols,
           const Optional& weight, bool centred, float weight_offset, const TensorView& stats, const Optional& dinput,
           const Optional& dweight, const Optional& dbias, const Optional& partial) {
          const Arguments args("layer_norm_backward", Backend::device, input);
          if (cols < 1) args.fail("cols", "at least 1", std::to_string(cols));
          if ((dweight || dbias) && !(partial && partial->ndim == 3 && partial->size(0) > 0))
            args.fail("partial", "a workspace (blocks, 2, columns) for the weight gradients", "none");
          const int64_t numel = input.numel(), rows = numel / cols;
          LayerNormBackwardParams p{};
          p.rows = rows;
          p.cols = cols;
          p.weight_offset = weight_offset;
          p.dtype = args.dtype(input, "input");
          p.weight_dtype = parameter_dtype(args, p.dtype, weight ? weight : dweight, dbias);
          p.doutput = args.flat(doutput, "doutput", p.dtype, numel);
          p.dsum = args.flat(dsum, "dsum", p.dtype, numel);
          p.input = args.flat(input, "input", p.dtype, rows * cols);
          p.weight = args.flat(weight, "weight", p.weight_dtype, cols);
          auto* found = static_cast<const float*>(args.contiguous(stats, "stats", DType::float32, {1 + centred, rows}));
          p.mean = centred ? found : nullptr;
          p.rstd = centred ? found + rows : found;
          p.dinput = args.flat(dinput, "dinput", p.dtype, numel);
          p.dweight = args.flat(dweight, "dweight", p.weight_dtype, cols);
          p.dbias = args.flat(dbias, "dbias", p.weight_dtype, cols);
          p.blocks = partial ? partial->size(0) : 0;
          p.partial = static_cast<float*>(args.flat(partial, "partial", DType::float32, p.blocks * 2 * cols));
          Backend::run(&Backend::Kernels::layer_norm_backward, p, input.device.index);
        });
}

}  // namespace torchweld
