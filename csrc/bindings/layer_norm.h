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

// That of residual and sum, and of their gradients: of the activations, or float32.
inline DType residual_dtype(const Arguments& args, DType dtype, const TensorView& t, const char* name) {
  const DType found = args.dtype(t, name);
  if (found != dtype && found != DType::float32)
    args.fail(name, std::string("dtype float32 or ") + name_of(dtype), name_of(found));
  return found;
}

// seed: int64, one element, or None: no dropout.
inline Dropout dropout_of(const Arguments& args, const std::optional<TensorView>& seed, double p) {
  if (!seed) return {};
  if (!(p >= 0 && p <= 1)) args.fail("dropout_p", "a probability", std::to_string(p));
  return make_dropout(args.indices(*seed, "seed", 1), p);
}

inline void check_sizes(const char* op, int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 1)
    throw py::value_error("[" + std::string(op) + "] rows, cols: expected at least 0 and 1, but got " +
                          std::to_string(rows) + " and " + std::to_string(cols));
}

template <class Backend>
void bind_layer_norm(Module& m) {
  using Optional = std::optional<TensorView>;

  // input, output: M * N elements; residual, sum: the same of a dtype of their own; weight, bias: N; stats: float32,
  // (2, M), mean and rstd, if centred, else (1, M), rstd alone; or None.
  m.def(
      "layer_norm_forward(input, residual, cols, weight, bias, eps, centred, weight_offset, sum, output, "
      "stats, dropout_p, seed, workspace)",
      [](const TensorView& input, const Optional& residual, int64_t cols, const Optional& weight, const Optional& bias,
         float eps, bool centred, float weight_offset, const Optional& sum, const TensorView& output,
         const Optional& stats, double dropout_p, const Optional& seed, const Optional& workspace) {
        const Arguments args("layer_norm_forward", Backend::device, input);
        if (cols < 1) args.fail("cols", "at least 1", std::to_string(cols));
        if (residual.has_value() != sum.has_value()) args.fail("sum", "a tensor if there is a residual", "the other");
        if (seed && !residual) args.fail("seed", "None without a residual", "a tensor");
        const int64_t numel = input.numel(), rows = numel / cols;
        LayerNormForwardParams p{};
        p.rows = rows;
        p.cols = cols;
        p.eps = eps;
        p.centred = centred;
        p.weight_offset = weight_offset;
        p.dtype = args.dtype(input, "input");
        p.weight_dtype = parameter_dtype(args, p.dtype, weight, bias);
        p.sum_dtype = residual ? residual_dtype(args, p.dtype, *residual, "residual") : p.dtype;
        p.dropout = dropout_of(args, seed, dropout_p);
        p.input = args.flat(input, "input", p.dtype, rows * cols);
        p.residual = args.flat(residual, "residual", p.sum_dtype, numel);
        p.weight = args.flat(weight, "weight", p.weight_dtype, cols);
        p.bias = args.flat(bias, "bias", p.weight_dtype, cols);
        p.sum = args.flat(sum, "sum", p.sum_dtype, numel);
        p.output = args.flat(output, "output", p.dtype, numel);
        if (stats) {
          auto* found = static_cast<float*>(args.contiguous(*stats, "stats", DType::float32, {1 + centred, rows}));
          p.mean = centred ? found : nullptr;
          p.rstd = centred ? found + rows : found;
        }
        p.workspace_size = workspace ? workspace->numel() : 0;
        p.workspace = static_cast<float*>(args.flat(workspace, "workspace", DType::float32, p.workspace_size));
        Backend::run(&Backend::Kernels::layer_norm_forward, p, input.device.index);
      });

  // How many float32 elements layer_norm_forward wants for its workspace, on the device with this index.
  m.def("layer_norm_forward_workspace(rows, cols, device)", [](int64_t rows, int64_t cols, int64_t device) {
    check_sizes("layer_norm_forward_workspace", rows, cols);
    return Backend::layer_norm_forward_workspace(rows, cols, static_cast<int32_t>(device));
  });

  // How many blocks the workspace of layer_norm_backward takes on the device with this index: a function of the shape
  // and of the device, never of the load, so that results are too. 0: none.
  m.def("layer_norm_workspace(rows, cols, weights, device)",
        [](int64_t rows, int64_t cols, bool weights, int64_t device) {
          check_sizes("layer_norm_workspace", rows, cols);
          return Backend::layer_norm_workspace(rows, cols, weights, static_cast<int32_t>(device));
        });

  // As above; input: what was normalised; partial: float32 (blocks, 2, N), the workspace.
  m.def(
      "layer_norm_backward(doutput, dsum, input, cols, weight, centred, weight_offset, stats, dinput, dx, "
      "dweight, dbias, partial, dropout_p, seed)",
      [](const TensorView& doutput, const Optional& dsum, const TensorView& input, int64_t cols, const Optional& weight,
         bool centred, float weight_offset, const TensorView& stats, const Optional& dinput, const Optional& dx,
         const Optional& dweight, const Optional& dbias, const Optional& partial, double dropout_p,
         const Optional& seed) {
        const Arguments args("layer_norm_backward", Backend::device, doutput);
        if (cols < 1) args.fail("cols", "at least 1", std::to_string(cols));
        if ((dweight || dbias) && !(partial && partial->ndim == 3 && partial->size(0) > 0))
          args.fail("partial", "a workspace [blocks, 2, columns] for the weight gradients", "none");
        const int64_t numel = input.numel(), rows = numel / cols;
        LayerNormBackwardParams p{};
        p.rows = rows;
        p.cols = cols;
        p.weight_offset = weight_offset;
        p.dtype = args.dtype(doutput, "doutput");
        p.weight_dtype = parameter_dtype(args, p.dtype, weight ? weight : dweight, dbias);
        p.sum_dtype = residual_dtype(args, p.dtype, input, "input");
        p.dropout = dropout_of(args, seed, dropout_p);
        p.input = args.flat(input, "input", p.sum_dtype, rows * cols);
        p.doutput = args.flat(doutput, "doutput", p.dtype, numel);
        p.dsum = args.flat(dsum, "dsum", p.sum_dtype, numel);
        p.weight = args.flat(weight, "weight", p.weight_dtype, cols);
        auto* found = static_cast<const float*>(args.contiguous(stats, "stats", DType::float32, {1 + centred, rows}));
        p.mean = centred ? found : nullptr;
        p.rstd = centred ? found + rows : found;
        p.dinput = args.flat(dinput, "dinput", p.sum_dtype, numel);
        p.dx = args.flat(dx, "dx", p.dtype, numel);
        p.dweight = args.flat(dweight, "dweight", p.weight_dtype, cols);
        p.dbias = args.flat(dbias, "dbias", p.weight_dtype, cols);
        p.blocks = partial ? partial->size(0) : 0;
        p.partial = static_cast<float*>(args.flat(partial, "partial", DType::float32, p.blocks * 2 * cols));
        Backend::run(&Backend::Kernels::layer_norm_backward, p, doutput.device.index);
      });
}

}  // namespace torchweld
