// adamw_, sgd_ and grad_norm: Python's arguments -> params, for any backend.
#pragma once

#include <tuple>

#include "bindings/optimizer_list.h"

namespace torchweld {

using OptionalView = std::optional<TensorView>;

inline const float* scalar(const Arguments& args, const OptionalView& t, const char* name) {
  return static_cast<const float*>(args.flat(t, name, DType::float32, 1));
}

// What every step is told besides its own lists and hyper-parameters: lr, lr_tensor, weight_decay, maximize,
// max_grad_norm, grad_norm, grad_scale, found_inf, zero_grads, rounding_seed, table.
using StepOptions = std::tuple<double, OptionalView, double, bool, double, OptionalView, OptionalView, OptionalView,
                               bool, std::optional<int64_t>, OptionalView>;

template <class Backend>
void fill(OptimizerParams& p, const Arguments& args, OptimizerRows<Backend>& list, const StepOptions& options) {
  const auto& [lr, lr_tensor, weight_decay, maximize, max_grad_norm, grad_norm, grad_scale, found_inf, zero_grads,
               rounding_seed, table] = options;
  p.count = static_cast<int64_t>(list.rows.size());
  p.total = list.total;
  p.tensors = list.rows.data();
  p.table = list.table(table);
  p.lr = lr;
  p.weight_decay = weight_decay;
  p.max_grad_norm = max_grad_norm;
  p.maximize = maximize;
  p.zero_grads = zero_grads;
  p.stochastic = rounding_seed.has_value();
  p.rounding_seed = static_cast<uint64_t>(rounding_seed.value_or(0));
  p.lr_tensor = scalar(args, lr_tensor, "lr");
  p.grad_norm = scalar(args, grad_norm, "grad_norm");
  p.grad_scale = scalar(args, grad_scale, "grad_scale");
  p.found_inf = scalar(args, found_inf, "found_inf");
  list.refuse_shared();
  if (p.stochastic)
    for (size_t i = 0; i < list.rows.size(); ++i)
      if (list.rows[i].dtype == DType::float16) args.fail("rounding_seed", "None for params of float16", "a seed");
}

template <class Backend>
void bind_optimizers(Module& m) {
  using Rows = OptimizerRows<Backend>;

  m.attr("OPTIMIZER_TABLE_WORDS") = Rows::words;
  m.attr("GRAD_NORM_BLOCKS") = kGradNormBlocks;

  // One step, in place. Returns what the kernels do not take; if there is any, nothing was done.
  m.def(
      "adamw_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, masters, beta1, beta2, eps, "
      "decoupled, options)",
      [](const TensorList& params, const TensorList& grads, const TensorList& exp_avgs, const TensorList& exp_avg_sqs,
         const TensorList& max_exp_avg_sqs, const TensorList& steps, const TensorList& masters, double beta1,
         double beta2, double eps, bool decoupled, const StepOptions& options) -> Refusals {
        if (params.empty()) return {};
        const Arguments args("adamw_", Backend::device, params[0]);
        Rows list(args, params);
        list.check_length(grads, "grads");
        list.check_length(exp_avgs, "exp_avgs");
        list.check_length(exp_avg_sqs, "exp_avg_sqs");
        if (!max_exp_avg_sqs.empty()) list.check_length(max_exp_avg_sqs, "max_exp_avg_sqs");
        list.check_length(steps, "steps");
        if (!masters.empty()) list.check_length(masters, "masters");
        for (size_t i = 0; i < params.size(); ++i) {
          list.base(params, grads, masters, i);
          list.state(exp_avgs, 0, "exp_avgs", i);
          list.state(exp_avg_sqs, 1, "exp_avg_sqs", i);
          if (!max_exp_avg_sqs.empty()) list.state(max_exp_avg_sqs, 2, "max_exp_avg_sqs", i);
          list.step(steps, i);
          list.place(i);
        }
        AdamWParams p{};
        fill(p, args, list, options);
        p.beta1 = beta1;
        p.beta2 = beta2;
        p.eps = eps;
        p.decoupled = decoupled;
        if (list.refused.empty()) Backend::run(&Backend::Kernels::adamw, p, params[0].device.index);
        return list.refused;
      });

  // Likewise; no buffers: no momentum.
  m.def("sgd_(params, grads, momentum_buffers, masters, momentum, dampening, nesterov, first_step, options)",
        [](const TensorList& params, const TensorList& grads, const TensorList& momentum_buffers,
           const TensorList& masters, double momentum, double dampening, bool nesterov, bool first_step,
           const StepOptions& options) -> Refusals {
          if (params.empty()) return {};
          const Arguments args("sgd_", Backend::device, params[0]);
          Rows list(args, params);
          list.check_length(grads, "grads");
          if (!momentum_buffers.empty()) list.check_length(momentum_buffers, "momentum_buffers");
          if (!masters.empty()) list.check_length(masters, "masters");
          for (size_t i = 0; i < params.size(); ++i) {
            list.base(params, grads, masters, i);
            if (!momentum_buffers.empty())
              list.state(momentum_buffers, 0, "momentum_buffers", i);
            else
              list.rows[i].state_dtype = list.rows[i].dtype;
            list.place(i);
          }
          SgdParams p{};
          fill(p, args, list, options);
          p.momentum = momentum;
          p.dampening = dampening;
          p.nesterov = nesterov;
          p.first_step = first_step;
          if (list.refused.empty()) Backend::run(&Backend::Kernels::sgd, p, params[0].device.index);
          return list.refused;
        });

  // norm = sqrt(sum of squares of all gradients) / |grad_scale|; partial: float64 (GRAD_NORM_BLOCKS). Returns as above.
  m.def("grad_norm(grads, grad_scale, partial, norm, table)",
        [](const TensorList& grads, const OptionalView& grad_scale, const TensorView& partial, const TensorView& norm,
           const OptionalView& table) -> Refusals {
          const Arguments args("grad_norm", Backend::device, norm);
          Rows list(args, grads);
          for (size_t i = 0; i < grads.size(); ++i) {
            list.rows[i].grad = list.memory(grads, i, "grads", &list.rows[i].grad_dtype);
            list.place(i);
            if (!is_dense(grads[i])) list.refuse(i, "grads with gaps or overlaps in memory");
          }
          GradNormParams p{};
          p.count = static_cast<int64_t>(grads.size());
          p.total = list.total;
          p.tensors = list.rows.data();
          p.table = list.table(table);
          p.grad_scale = scalar(args, grad_scale, "grad_scale");
          p.partial = args.doubles(partial, "partial", kGradNormBlocks);
          p.norm = static_cast<float*>(args.flat(norm, "norm", DType::float32, 1));
          if (list.refused.empty()) Backend::run(&Backend::Kernels::grad_norm, p, norm.device.index);
          return list.refused;
        });
}

}  // namespace torchweld
