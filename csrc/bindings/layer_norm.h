// layer_norm_forward, layer_norm_backward: tensors -> params, for any backend.
#pragma once

#include "bindings/tensor.h"
#include "params/norm.h"

namespace torchweld {

// The numbers of a norm; weight_offset: 1 for a zero-centred weight, else 0; dropout_p: 0 without a seed.
struct Norm {
  int64_t cols;
  float eps;
  bool centred;
  float weight_offset;
  double dropout_p;

  static constexpr auto fields() {
    return std::tuple{Field{"cols", &Norm::cols}, Field{"eps", &Norm::eps}, Field{"centred", &Norm::centred},
                      Field{"weight_offset", &Norm::weight_offset}, Field{"dropout_p", &Norm::dropout_p}};
  }
};

// The dtype of a tensor that must be `dtype` or float32.
inline DType wide_dtype(const Arguments& args, DType dtype, const TensorView& t, const char* name) {
  const DType found = args.dtype(t, name);
  if (found != dtype && found != DType::float32)
    args.fail(name, std::string("dtype float32 or ") + name_of(dtype), name_of(found));
  return found;
}

// Weight, bias and their gradients share one dtype: that of the activations, or float32.
inline DType parameter_dtype(const Arguments& args, DType dtype, const std::optional<TensorView>& a,
                             const std::optional<TensorView>& b) {
  return a ? wide_dtype(args, dtype, *a, "weight") : b ? wide_dtype(args, dtype, *b, "bias") : dtype;
}

// Unpacks what both directions share: the numbers, and the dropout by its seed (int64, one element; None: no dropout).
inline void fill_norm(const Arguments& args, LayerNormParams& p, const TensorView& input, const Norm& norm,
                      const std::optional<TensorView>& seed) {
  if (norm.cols < 1) args.fail("cols", "at least 1", std::to_string(norm.cols));
  p.rows = input.numel() / norm.cols;
  p.cols = norm.cols;
  p.eps = norm.eps;
  p.centred = norm.centred;
  p.weight_offset = norm.weight_offset;
  if (!seed) return;
  if (!(norm.dropout_p >= 0 && norm.dropout_p <= 1))
    args.fail("dropout_p", "a probability", std::to_string(norm.dropout_p));
  p.dropout = make_dropout(args.indices(*seed, "seed", 1), norm.dropout_p);
}

// The statistics of the rows: mean and rstd if centred, else rstd alone.
template <class Params>
void set_stats(Params& p, float* stats) {
  p.mean = p.centred ? stats : nullptr;
  p.rstd = p.centred ? stats + p.rows : stats;
}

template <class Params>
void set_stats(const Arguments& args, Params& p, const TensorView& stats) {
  set_stats(p, static_cast<float*>(args.contiguous(stats, "stats", DType::float32, {1 + p.centred, p.rows})));
}

inline void check_sizes(const char* op, int64_t rows, int64_t cols) {
  if (rows < 0 || cols < 1)
    throw py::value_error("[" + std::string(op) + "] rows, cols: expected at least 0 and 1, but got " +
                          std::to_string(rows) + " and " + std::to_string(cols));
}

template <class Backend>
void bind_layer_norm(Module& m) {
  using Optional = std::optional<TensorView>;

  m.def_record<Norm>("Norm");

  // input, output: M * N elements; residual, sum: M * N elements of sum_dtype; weight, bias: N; stats: float32 (2, M)
  // if centred, else (1, M), or None.
  m.def("layer_norm_forward(input, residual, weight, bias, seed, norm, sum, output, stats, workspace)",
        [](const TensorView& input, const Optional& residual, const Optional& weight, const Optional& bias,
           const Optional& seed, const Norm& norm, const Optional& sum, const TensorView& output, const Optional& stats,
           const Optional& workspace) {
          const Arguments args("layer_norm_forward", Backend::device, input);
          LayerNormForwardParams p{};
          fill_norm(args, p, input, norm, seed);
          if (residual.has_value() != sum.has_value()) args.fail("sum", "a tensor if there is a residual", "the other");
          if (seed && !residual) args.fail("seed", "None without a residual", "a tensor");
          const int64_t numel = input.numel();
          p.dtype = args.dtype(input, "input");
          p.weight_dtype = parameter_dtype(args, p.dtype, weight, bias);
          p.sum_dtype = residual ? wide_dtype(args, p.dtype, *residual, "residual") : p.dtype;
          p.input = args.flat(input, "input", p.dtype, p.rows * p.cols);
          p.residual = args.flat(residual, "residual", p.sum_dtype, numel);
          p.weight = args.flat(weight, "weight", p.weight_dtype, p.cols);
          p.bias = args.flat(bias, "bias", p.weight_dtype, p.cols);
          p.sum = args.flat(sum, "sum", p.sum_dtype, numel);
          p.output = args.flat(output, "output", p.dtype, numel);
          if (stats) set_stats(args, p, *stats);
          p.workspace_size = workspace ? workspace->numel() : 0;
          p.workspace = static_cast<float*>(args.flat(workspace, "workspace", DType::float32, p.workspace_size));
          Backend::run(&Backend::Kernels::layer_norm_forward, p, input.device.index);
        });

  // The float32 elements of layer_norm_forward's workspace, on the device with this index.
  m.def("layer_norm_forward_workspace(rows, cols, device)", [](int64_t rows, int64_t cols, int64_t device) {
    check_sizes("layer_norm_forward_workspace", rows, cols);
    return Backend::layer_norm_forward_workspace(rows, cols, static_cast<int32_t>(device));
  });

  // The blocks of layer_norm_backward's workspace, on the device with this index. They depend on the shape and the
  // device alone, so results do too. 0: no workspace.
  m.def("layer_norm_workspace(rows, cols, weights, device)",
        [](int64_t rows, int64_t cols, bool weights, int64_t device) {
          check_sizes("layer_norm_workspace", rows, cols);
          return Backend::layer_norm_workspace(rows, cols, weights, static_cast<int32_t>(device));
        });

  // input: what was normalised; partial: float32 (blocks, 2, N), the workspace; the others as in the forward.
  m.def("layer_norm_backward(doutput, dsum, input, weight, stats, seed, norm, dinput, dx, dweight, dbias, partial)",
        [](const TensorView& doutput, const Optional& dsum, const TensorView& input, const Optional& weight,
           const TensorView& stats, const Optional& seed, const Norm& norm, const Optional& dinput, const Optional& dx,
           const Optional& dweight, const Optional& dbias, const Optional& partial) {
          const Arguments args("layer_norm_backward", Backend::device, doutput);
          LayerNormBackwardParams p{};
          fill_norm(args, p, input, norm, seed);
          if ((dweight || dbias) && !(partial && partial->ndim == 3 && partial->size(0) > 0))
            args.fail("partial", "a workspace [blocks, 2, columns] for the weight gradients", "none");
          const int64_t numel = input.numel();
          p.dtype = args.dtype(doutput, "doutput");
          p.weight_dtype = parameter_dtype(args, p.dtype, weight ? weight : dweight, dbias);
          p.sum_dtype = wide_dtype(args, p.dtype, input, "input");
          p.input = args.flat(input, "input", p.sum_dtype, p.rows * p.cols);
          p.doutput = args.flat(doutput, "doutput", p.dtype, numel);
          p.dsum = args.flat(dsum, "dsum", p.sum_dtype, numel);
          p.weight = args.flat(weight, "weight", p.weight_dtype, p.cols);
          set_stats(args, p, stats);
          p.dinput = args.flat(dinput, "dinput", p.sum_dtype, numel);
          p.dx = args.flat(dx, "dx", p.dtype, numel);
          p.dweight = args.flat(dweight, "dweight", p.weight_dtype, p.cols);
          p.dbias = args.flat(dbias, "dbias", p.weight_dtype, p.cols);
          p.blocks = partial ? partial->size(0) : 0;
          p.partial = static_cast<float*>(args.flat(partial, "partial", DType::float32, p.blocks * 2 * p.cols));
          Backend::run(&Backend::Kernels::layer_norm_backward, p, doutput.device.index);
        });
}

}  // namespace torchweld
