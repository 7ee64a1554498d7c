// adamw_, sgd_ and grad_norm: Python's arguments -> params, for any backend.
#pragma once

#include <array>
#include <tuple>

#include "bindings/optimizer_list.h"

namespace torchweld {

using OptionalView = std::optional<TensorView>;

inline const float* scalar(const Arguments& args, const OptionalView& t, const char* name) {
  return static_cast<const float*>(args.flat(t, name, DType::float32, 1));
}

// The arguments that all steps share.
struct Step {
  double lr;               // ignored if there is an lr_tensor
  OptionalView lr_tensor;  // float32 of one element, as are the other tensors
  double weight_decay;
  bool maximize;
  double max_grad_norm;  // 0: no clipping
  OptionalView grad_norm, grad_scale, found_inf;
  bool zero_grads;
  std::optional<int64_t> rounding_seed;  // None: bfloat16 parameters are rounded to nearest

  static constexpr auto fields() {
    return std::tuple{Field{"lr", &Step::lr},
                      Field{"lr_tensor", &Step::lr_tensor},
                      Field{"weight_decay", &Step::weight_decay},
                      Field{"maximize", &Step::maximize},
                      Field{"max_grad_norm", &Step::max_grad_norm},
                      Field{"grad_norm", &Step::grad_norm},
                      Field{"grad_scale", &Step::grad_scale},
                      Field{"found_inf", &Step::found_inf},
                      Field{"zero_grads", &Step::zero_grads},
                      Field{"rounding_seed", &Step::rounding_seed}};
  }
};

// One list of the state that an optimizer keeps for each parameter. Its tensors go to `slot` of OptimizerTensor::state.
struct StateList {
  const char* name;
  const TensorList& tensors;
  int slot;
  bool may_be_empty;

  bool is_there() const { return !may_be_empty || !tensors.empty(); }
};

// The lists of each optimizer, all in the order of the parameters, and the numbers of its update rule.
struct AdamWLists {
  TensorList params, grads, exp_avgs, exp_avg_sqs;
  TensorList max_exp_avg_sqs;  // empty: no AMSGrad
  TensorList steps;
  TensorList masters;  // empty: none

  static constexpr auto fields() {
    return std::tuple{Field{"params", &AdamWLists::params},
                      Field{"grads", &AdamWLists::grads},
                      Field{"exp_avgs", &AdamWLists::exp_avgs},
                      Field{"exp_avg_sqs", &AdamWLists::exp_avg_sqs},
                      Field{"max_exp_avg_sqs", &AdamWLists::max_exp_avg_sqs},
                      Field{"steps", &AdamWLists::steps},
                      Field{"masters", &AdamWLists::masters}};
  }

  std::array<StateList, 3> state() const {
    return {{{"exp_avgs", exp_avgs, 0, false},
             {"exp_avg_sqs", exp_avg_sqs, 1, false},
             {"max_exp_avg_sqs", max_exp_avg_sqs, 2, true}}};
  }

  const TensorList* counts() const { return &steps; }  // of the updates so far
};

struct AdamWOptions {
  double beta1, beta2, eps;
  bool decoupled;

  static constexpr auto fields() {
    return std::tuple{Field{"beta1", &AdamWOptions::beta1}, Field{"beta2", &AdamWOptions::beta2},
                      Field{"eps", &AdamWOptions::eps}, Field{"decoupled", &AdamWOptions::decoupled}};
  }

  void fill(AdamWParams& p) const {
    p.beta1 = beta1;
    p.beta2 = beta2;
    p.eps = eps;
    p.decoupled = decoupled;
  }
};

struct SgdLists {
  TensorList params, grads;
  TensorList momentum_buffers;  // empty: no momentum
  TensorList masters;           // empty: none

  static constexpr auto fields() {
    return std::tuple{Field{"params", &SgdLists::params}, Field{"grads", &SgdLists::grads},
                      Field{"momentum_buffers", &SgdLists::momentum_buffers}, Field{"masters", &SgdLists::masters}};
  }

  std::array<StateList, 1> state() const { return {{{"momentum_buffers", momentum_buffers, 0, true}}}; }

  const TensorList* counts() const { return nullptr; }
};

struct SgdOptions {
  double momentum, dampening;
  bool nesterov, first_step;

  static constexpr auto fields() {
    return std::tuple{Field{"momentum", &SgdOptions::momentum}, Field{"dampening", &SgdOptions::dampening},
                      Field{"nesterov", &SgdOptions::nesterov}, Field{"first_step", &SgdOptions::first_step}};
  }

  void fill(SgdParams& p) const {
    p.momentum = momentum;
    p.dampening = dampening;
    p.nesterov = nesterov;
    p.first_step = first_step;
  }
};

template <class Backend>
void fill(OptimizerParams& p, const Arguments& args, OptimizerRows<Backend>& list, const Step& step,
          const OptionalView& table) {
  p.count = static_cast<int64_t>(list.rows.size());
  p.total = list.total;
  p.tensors = list.rows.data();
  p.table = list.table(table);
  p.lr = step.lr;
  p.weight_decay = step.weight_decay;
  p.max_grad_norm = step.max_grad_norm;
  p.maximize = step.maximize;
  p.zero_grads = step.zero_grads;
  p.stochastic = step.rounding_seed.has_value();
  p.rounding_seed = static_cast<uint64_t>(step.rounding_seed.value_or(0));
  p.lr_tensor = scalar(args, step.lr_tensor, "lr");
  p.grad_norm = step.max_grad_norm > 0 ? scalar(args, step.grad_norm, "grad_norm") : nullptr;
  p.grad_scale = scalar(args, step.grad_scale, "grad_scale");
  p.found_inf = scalar(args, step.found_inf, "found_inf");
  list.refuse_shared();
  if (p.stochastic)
    for (size_t i = 0; i < list.rows.size(); ++i)
      if (list.rows[i].dtype == DType::float16) args.fail("rounding_seed", "None for params of float16", "a seed");
}

// One step after all its checks, before it has touched memory.
template <class Params>
struct PreparedStep {
  std::vector<OptimizerTensor> rows;  // what `params` points to
  Refusals refused;                   // the tensors that the kernels do not take; if there are any, nothing runs
  Params params{};
  int32_t device = 0;

  template <class Backend, class Kernel>
  void run(Kernel kernel) const {
    Backend::run(kernel, params, device);
  }
};

template <class Backend, class Params, class Lists, class Options>
PreparedStep<Params> prepare_step(const char* op, const Lists& lists, const Options& options, const Step& step,
                                  const OptionalView& table) {
  const Arguments args(op, Backend::device, lists.params[0]);
  OptimizerRows<Backend> list(args, lists.params);
  list.check_length(lists.grads, "grads");
  for (const StateList& each : lists.state())
    if (each.is_there()) list.check_length(each.tensors, each.name);
  if (lists.counts() != nullptr) list.check_length(*lists.counts(), "steps");
  if (!lists.masters.empty()) list.check_length(lists.masters, "masters");
  for (size_t i = 0; i < lists.params.size(); ++i) {
    list.base(lists.params, lists.grads, lists.masters, i);
    for (const StateList& each : lists.state())
      if (each.is_there()) list.state(each.tensors, each.slot, each.name, i);
    if (lists.counts() != nullptr) list.step(*lists.counts(), i);
    list.place(i);
  }
  PreparedStep<Params> prepared;
  fill(prepared.params, args, list, step, table);
  options.fill(prepared.params);
  prepared.rows = std::move(list.rows);
  prepared.refused = std::move(list.refused);
  prepared.device = lists.params[0].device.index;
  return prepared;
}

// One step, in place. Returns the tensors that the kernels do not take. If there are any, the call changes nothing.
template <class Backend, class Params, class Kernel, class Lists, class Options>
Refusals run_step(const char* op, Kernel kernel, const Lists& lists, const Options& options, const Step& step,
                  const OptionalView& table) {
  if (lists.params.empty()) return {};
  const auto prepared = prepare_step<Backend, Params>(op, lists, options, step, table);
  if (prepared.refused.empty()) prepared.template run<Backend>(kernel);
  return prepared.refused;
}

template <class Backend>
void bind_optimizers(Module& m) {
  using Rows = OptimizerRows<Backend>;

  m.attr("OPTIMIZER_TABLE_WORDS") = Rows::words;
  m.attr("GRAD_NORM_BLOCKS") = kGradNormBlocks;

  m.def_record<Step>("Step");
  m.def_record<AdamWLists>("AdamWLists");
  m.def_record<AdamWOptions>("AdamWOptions");
  m.def_record<SgdLists>("SgdLists");
  m.def_record<SgdOptions>("SgdOptions");

  // table: workspace of OPTIMIZER_TABLE_WORDS for each parameter.
  m.def("adamw_(lists, options, step, table)",
        [](const AdamWLists& lists, const AdamWOptions& options, const Step& step, const OptionalView& table) {
          return run_step<Backend, AdamWParams>("adamw_", &Backend::Kernels::adamw, lists, options, step, table);
        });

  m.def("sgd_(lists, options, step, table)",
        [](const SgdLists& lists, const SgdOptions& options, const Step& step, const OptionalView& table) {
          return run_step<Backend, SgdParams>("sgd_", &Backend::Kernels::sgd, lists, options, step, table);
        });

  // norm = sqrt(sum of squares of all gradients) / |grad_scale|; partial: float64 (GRAD_NORM_BLOCKS). Returns
  // the tensors that the kernels do not take.
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
