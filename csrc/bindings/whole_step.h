// Whole steps: the parameter groups and the state of an optimizer in, all their updates done, in one crossing from
// Python. A step of few and small parameters costs mostly the way to its kernel.
//
// A whole step serves the common step alone: plain tensors on the CPU that have their state already, and no option
// beyond torch's own. For any other it returns None before it has touched anything, and the optimizer's Python code
// makes all checks and raises all errors.
#pragma once

#include <cmath>
#include <exception>
#include <limits>
#include <vector>

#include "bindings/common_call.h"
#include "bindings/optimizer.h"

namespace torchweld {
namespace whole {

// A string that Python keeps: dictionaries find it by its address.
class Name {
 public:
  explicit Name(const char* text) : text_(PyUnicode_InternFromString(text)) {}
  PyObject* get() const { return text_; }

 private:
  PyObject* text_;  // for as long as the process
};

inline py::object find(PyObject* dictionary, const Name& name) {
  PyObject* found = PyDict_GetItemWithError(dictionary, name.get());
  if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(found);
}

// A parameter group. What it does not say, the optimizer's defaults say.
struct Group {
  PyObject *options, *defaults;

  py::object operator[](const Name& name) const {
    py::object found = find(options, name);
    return found ? found : find(defaults, name);
  }

  // Each returns false for what is not common.
  bool number(const Name& name, double low, double high, double& value) const {
    return is_number((*this)[name], low, high, value);
  }
  bool flag(const Name& name, bool& value) const {
    const py::object found = (*this)[name];
    value = found.is(py::bool_(true));
    return value || is_off(found);
  }
  bool is_off(const Name& name) const { return is_off((*this)[name]); }

  static bool is_number(const py::object& found, double low, double high, double& value) {
    if (!found || !(PyFloat_Check(found.ptr()) || PyLong_CheckExact(found.ptr()))) return false;
    value = PyFloat_AsDouble(found.ptr());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value >= low && value <= high;
  }

 private:
  static bool is_off(const py::object& found) { return !found || found.is_none() || found.is(py::bool_(false)); }
};

// The parameters of a group that have a gradient, and what belongs to each.
class Members {
 public:
  // False: some have no state yet, or are not plain tensors.
  bool read(const Group& group, PyObject* state, bool has_state) {
    static const Name kParams("params"), kGrad("grad");
    const py::object all = group[kParams];
    if (!all || !PyList_CheckExact(all.ptr())) return false;
    for (const py::handle param : py::reinterpret_borrow<py::list>(all)) {
      if (!is_plain(param.ptr())) return false;
      py::object grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param.ptr(), kGrad.get()));
      if (!grad) throw py::error_already_set();
      if (grad.is_none()) continue;
      if (!is_plain(grad.ptr())) return false;
      params_.append(param);
      grads_.append(std::move(grad));
      if (!has_state) continue;
      PyObject* own = PyDict_GetItemWithError(state, param.ptr());
      if (own == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (own == nullptr || !PyDict_CheckExact(own)) return false;
      states_.push_back(py::reinterpret_borrow<py::object>(own));
    }
    return true;
  }

  bool empty() const { return params_.empty(); }
  bool params(TensorList& list, py::list& written) const { return tensors(params_, list, &written); }
  bool grads(TensorList& list) const { return tensors(grads_, list, nullptr); }

  bool state(const Name& name, TensorList& list, py::list& written) const {
    py::list found;
    for (const py::object& each : states_) {
      const py::object tensor = find(each.ptr(), name);
      if (!tensor || !is_plain(tensor.ptr())) return false;
      found.append(tensor);
    }
    return tensors(found, list, &written);
  }

 private:
  static bool is_plain(PyObject* object) {
    const auto& api = TorchApi::get();
    return Py_TYPE(object) == api.tensor_type || Py_TYPE(object) == api.parameter_type;
  }

  static bool tensors(const py::list& objects, TensorList& list, py::list* written) {
    Reader<TensorList> reader;
    if (!reader.load(objects.ptr())) return false;
    list = reader.get();
    for (const TensorView& t : list)
      if (t.device.type != dlpack::kCPU) return false;
    if (written != nullptr)
      for (const py::handle each : objects) written->append(each);
    return true;
  }

  py::list params_, grads_;
  std::vector<py::object> states_;
};

constexpr double kAnyNumber = std::numeric_limits<double>::max();

// What is common to the groups of all optimizers.
inline bool reads_shared(const Group& group, Step& step) {
  static const Name kLr("lr"), kWeightDecay("weight_decay"), kMaximize("maximize");
  static const Name kOthers[] = {Name("foreach"),       Name("differentiable"), Name("capturable"),
                                 Name("max_grad_norm"), Name("master_weights"), Name("stochastic_rounding"),
                                 Name("zero_grads"),    Name("offload")};
  for (const Name& each : kOthers)
    if (!group.is_off(each)) return false;
  return group.number(kLr, 0, kAnyNumber, step.lr) && group.number(kWeightDecay, 0, kAnyNumber, step.weight_decay) &&
         group.flag(kMaximize, step.maximize);
}

// Each optimizer's own part.
struct AdamW {
  using Params = AdamWParams;
  using Lists = AdamWLists;
  using Options = AdamWOptions;
  static constexpr const char* kOp = "adamw_";
  template <class Backend>
  static constexpr auto kKernel = &Backend::Kernels::adamw;

  static bool reads(const Group& group, Options& options) {
    static const Name kBetas("betas"), kEps("eps"), kDecoupled("decoupled_weight_decay");
    const py::object betas = group[kBetas];
    if (!betas || !PyTuple_CheckExact(betas.ptr()) || PyTuple_GET_SIZE(betas.ptr()) != 2) return false;
    const auto beta = [&](int i, double& value) {
      const auto found = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(betas.ptr(), i));
      return Group::is_number(found, 0, std::nextafter(1.0, 0.0), value);
    };
    return beta(0, options.beta1) && beta(1, options.beta2) && group.number(kEps, 0, kAnyNumber, options.eps) &&
           group.flag(kDecoupled, options.decoupled);
  }

  static bool has_state(const Options&) { return true; }

  static bool reads(const Group& group, const Members& members, const Options&, Lists& lists, py::list& written) {
    static const Name kAmsgrad("amsgrad"), kExpAvg("exp_avg"), kExpAvgSq("exp_avg_sq"), kLargest("max_exp_avg_sq"),
        kStep("step");
    bool amsgrad = false;
    return group.flag(kAmsgrad, amsgrad) && members.state(kExpAvg, lists.exp_avgs, written) &&
           members.state(kExpAvgSq, lists.exp_avg_sqs, written) && members.state(kStep, lists.steps, written) &&
           (!amsgrad || members.state(kLargest, lists.max_exp_avg_sqs, written));
  }
};

struct Sgd {
  using Params = SgdParams;
  using Lists = SgdLists;
  using Options = SgdOptions;
  static constexpr const char* kOp = "sgd_";
  template <class Backend>
  static constexpr auto kKernel = &Backend::Kernels::sgd;

  static bool reads(const Group& group, Options& options) {
    static const Name kMomentum("momentum"), kDampening("dampening"), kNesterov("nesterov"), kFused("fused");
    return group.number(kMomentum, 0, kAnyNumber, options.momentum) &&
           group.number(kDampening, -kAnyNumber, kAnyNumber, options.dampening) &&
           group.flag(kNesterov, options.nesterov) && group.is_off(kFused);
  }

  static bool has_state(const Options& options) { return options.momentum != 0; }

  static bool reads(const Group&, const Members& members, const Options& options, Lists& lists, py::list& written) {
    static const Name kBuffer("momentum_buffer");
    return !has_state(options) || members.state(kBuffer, lists.momentum_buffers, written);
  }
};

// One step of every group. Returns the tensors that it has written to.
template <class Backend, class Optimizer>
py::object step(Object groups, Object state, Object defaults) {
  using Prepared = PreparedStep<typename Optimizer::Params>;
  if (!PyList_CheckExact(groups.source) || !PyDict_Check(state.source) || !PyDict_CheckExact(defaults.source) ||
      !Surroundings::get().are_plain())
    return py::none();
  std::vector<Prepared> steps;
  std::vector<typename Optimizer::Lists> held;  // their tensors live until the kernels have run
  py::list written;
  try {
    for (const py::handle each : py::reinterpret_borrow<py::list>(groups.source)) {
      if (!PyDict_CheckExact(each.ptr())) return py::none();
      const Group group{each.ptr(), defaults.source};
      Step shared{};
      typename Optimizer::Options options{};
      typename Optimizer::Lists lists;
      Members members;
      if (!reads_shared(group, shared) || !Optimizer::reads(group, options) ||
          !members.read(group, state.source, Optimizer::has_state(options)))
        return py::none();
      if (members.empty()) continue;
      if (!members.params(lists.params, written) || !members.grads(lists.grads) ||
          !Optimizer::reads(group, members, options, lists, written))
        return py::none();
      steps.push_back(
          prepare_step<Backend, typename Optimizer::Params>(Optimizer::kOp, lists, options, shared, std::nullopt));
      if (!steps.back().refused.empty()) return py::none();
      held.push_back(std::move(lists));
    }
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_Exception)) throw;  // Ctrl-C
    return py::none();                           // the Python code meets the same error, and says more
  } catch (const std::exception&) {
    return py::none();
  }
  for (const Prepared& each : steps) each.template run<Backend>(Optimizer::template kKernel<Backend>);
  return written;
}

}  // namespace whole

template <class Backend>
void bind_whole_steps(Module& m) {
  m.def("whole_adamw_step(groups, state, defaults)", &whole::step<Backend, whole::AdamW>);
  m.def("whole_sgd_step(groups, state, defaults)", &whole::step<Backend, whole::Sgd>);
}

}  // namespace torchweld
