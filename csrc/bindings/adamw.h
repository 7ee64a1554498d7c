// adamw_ and grad_norm: lists of tensors -> params, for any backend. All is checked before any memory is touched.
#pragma once

#include <utility>

#include "bindings/tensor.h"

namespace torchweld {

using TensorList = std::vector<TensorView>;
using Refusals = std::vector<std::pair<int64_t, std::string>>;  // index in the list, reason

inline bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

inline bool same_strides(const TensorView& a, const TensorView& b) {
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] > 1 && a.strides[d] != b.strides[d]) return false;
  return true;
}

// Whether the elements fill their memory without gaps or overlaps, in whatever order of the dimensions.
inline bool is_dense(const TensorView& t) {
  if (t.numel() == 0) return true;
  int left = 0;
  for (int d = 0; d < t.ndim; ++d) left += t.shape[d] > 1;
  for (int64_t expected = 1; left > 0; --left) {
    int d = t.ndim - 1;
    while (d >= 0 && (t.shape[d] == 1 || t.strides[d] != expected)) --d;
    if (d < 0) return false;
    expected *= t.shape[d];
  }
  return true;
}

// The rows of a list, and which of its tensors the kernels do not take.
template <class Backend>
class AdamWRows {
 public:
  // int64 elements of workspace for each tensor: the CPU kernels read the rows where they were made.
  static constexpr int64_t words = Backend::adamw_table ? sizeof(AdamWTensor) / 8 : 0;
  static_assert(sizeof(AdamWTensor) % 8 == 0, "a row of the table is a whole number of 64-bit words");

  AdamWRows(const Arguments& args, const TensorList& first)
      : rows(first.size()), args_(args), first_(first) {}

  void check_length(const TensorList& list, const char* name) const {
    if (list.size() != rows.size())
      args_.fail(name, std::to_string(rows.size()) + " tensors, as many as params", std::to_string(list.size()));
  }

  // Memory of list[i]. Raises if it does not go with its twin in the first list; refuses what a kernel does not take.
  void* memory(const TensorList& list, size_t i, const char* name, DType* dtype) {
    const TensorView &t = list[i], &twin = first_[i];
    if (!args_.is_here(t)) args_.check_device(t, label(name, i).c_str());
    if (const auto found = dtype_of(t.dtype)) *dtype = *found;
    else if (t.dtype.code == dlpack::kInt || t.dtype.code == dlpack::kUInt || t.dtype.code == dlpack::kBool)
      args_.fail(label(name, i).c_str(), "a floating-point dtype", name_of(t.dtype));
    else refuse(i, std::string(name) + " of dtype " + name_of(t.dtype));
    if (!same_shape(t, twin))
      args_.fail(label(name, i).c_str(), "shape " + Arguments::list(twin.shape, twin.ndim), Arguments::list(t.shape, t.ndim));
    if (!same_strides(t, twin)) refuse(i, std::string(name) + " with other strides than the parameter");
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  float* step(const TensorList& steps, size_t i) {
    const TensorView& t = steps[i];
    if (!args_.is_here(t)) args_.check_device(t, label("steps", i).c_str());
    if (t.numel() != 1) args_.fail(label("steps", i).c_str(), "one element", "shape " + Arguments::list(t.shape, t.ndim));
    if (dtype_of(t.dtype) != DType::float32) refuse(i, "steps of dtype " + name_of(t.dtype));
    return reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset);
  }

  // Gives row i its place in the concatenation.
  void place(size_t i) {
    rows[i].numel = first_[i].numel();
    rows[i].begin = total;
    total += (rows[i].numel + chunk - 1) / chunk * chunk;
  }

  void refuse(size_t i, const std::string& reason) {
    const auto index = static_cast<int64_t>(i);
    if (refused.empty() || refused.back().first != index) refused.emplace_back(index, reason);
  }

  // Where a copy of the rows goes on the device; the CPU needs none.
  AdamWTensor* table(const std::optional<TensorView>& workspace) const {
    if (!Backend::adamw_table) return nullptr;
    const int64_t needed = words * static_cast<int64_t>(rows.size());
    if (!workspace || workspace->dtype.bits != 64 || workspace->numel() < needed)
      args_.fail("table", std::to_string(needed) + " int64 elements", workspace ? "fewer" : "none");
    args_.check_device(*workspace, "table");
    return reinterpret_cast<AdamWTensor*>(static_cast<char*>(workspace->data) + workspace->byte_offset);
  }

  std::vector<AdamWTensor> rows;
  Refusals refused;
  int64_t total = 0;

 private:
  static constexpr int64_t chunk = Backend::adamw_table ? kAdamWChunkCuda : kAdamWChunkCpu;

  static std::string label(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

  const Arguments& args_;
  const TensorList& first_;
};

inline const float* scalar(const Arguments& args, const std::optional<TensorView>& t, const char* name) {
  return static_cast<const float*>(args.flat(t, name, DType::float32, 1));
}

template <class Backend>
void bind_adamw(py::module_& m) {
  using Optional = std::optional<TensorView>;
  using Rows = AdamWRows<Backend>;

  m.attr("ADAMW_TABLE_WORDS") = Rows::words;
  m.attr("GRAD_NORM_BLOCKS") = kGradNormBlocks;

  // One step, in place. Returns what the kernels do not take; if there is any, nothing was done.
  m.def("adamw_", [](const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs, const TensorList& steps, double lr,
                     const Optional& lr_tensor, double beta1, double beta2, double eps, double weight_decay,
                     bool decoupled, bool maximize, double max_grad_norm, const Optional& grad_norm,
                     const Optional& grad_scale, const Optional& found_inf, const Optional& table) -> Refusals {
    if (params.empty()) return {};
    const Arguments args("adamw_", Backend::device, params[0]);
    Rows list(args, params);
    const bool amsgrad = !max_exp_avg_sqs.empty();
    list.check_length(grads, "grads");
    list.check_length(exp_avgs, "exp_avgs");
    list.check_length(exp_avg_sqs, "exp_avg_sqs");
    if (amsgrad) list.check_length(max_exp_avg_sqs, "max_exp_avg_sqs");
    list.check_length(steps, "steps");
    for (size_t i = 0; i < params.size(); ++i) {
      AdamWTensor& row = list.rows[i];
      DType second, third;
      row.param = list.memory(params, i, "params", &row.dtype);
      row.grad = list.memory(grads, i, "grads", &row.grad_dtype);
      row.exp_avg = list.memory(exp_avgs, i, "exp_avgs", &row.state_dtype);
      second = third = row.state_dtype;
      row.exp_avg_sq = list.memory(exp_avg_sqs, i, "exp_avg_sqs", &second);
      if (amsgrad) row.max_exp_avg_sq = list.memory(max_exp_avg_sqs, i, "max_exp_avg_sqs", &third);
      row.step = list.step(steps, i);
      list.place(i);
      if (!is_dense(params[i])) list.refuse(i, "params with gaps or overlaps in memory");
      if (row.grad_dtype != row.dtype && row.grad_dtype != DType::float32)
        list.refuse(i, std::string("grads of dtype ") + name_of(row.grad_dtype) + " beside params of " + name_of(row.dtype));
      if (row.state_dtype != row.dtype && row.state_dtype != DType::float32)
        list.refuse(i, std::string("exp_avgs of dtype ") + name_of(row.state_dtype) + " beside params of " + name_of(row.dtype));
      if (second != row.state_dtype || third != row.state_dtype) list.refuse(i, "running means of different dtypes");
    }
    AdamWParams p{};
    p.count = static_cast<int64_t>(params.size());
    p.total = list.total;
    p.tensors = list.rows.data();
    p.table = list.table(table);
    p.lr = lr;
    p.beta1 = beta1;
    p.beta2 = beta2;
    p.eps = eps;
    p.weight_decay = weight_decay;
    p.decoupled = decoupled;
    p.maximize = maximize;
    p.max_grad_norm = max_grad_norm;
    p.lr_tensor = scalar(args, lr_tensor, "lr");
    p.grad_norm = scalar(args, grad_norm, "grad_norm");
    p.grad_scale = scalar(args, grad_scale, "grad_scale");
    p.found_inf = scalar(args, found_inf, "found_inf");
    if (list.refused.empty()) Backend::run(&Backend::Kernels::adamw, p, params[0].device.index);
    return list.refused;
  });

  // norm = sqrt(sum of squares of all gradients) / |grad_scale|; partial: float64 (GRAD_NORM_BLOCKS). Returns as above.
  m.def("grad_norm", [](const TensorList& grads, const Optional& grad_scale, const TensorView& partial,
                        const TensorView& norm, const Optional& table) -> Refusals {
    const Arguments args("grad_norm", Backend::device, norm);
    Rows list(args, grads);
    for (size_t i = 0; i < grads.size(); ++i) {
      list.rows[i].grad = list.memory(grads, i, "grads", &list.rows[i].grad_dtype);
      list.place(i);
      if (!is_dense(grads[i])) list.refuse(i, "grads with gaps or overlaps in memory");
    }
    if (partial.dtype.bits != 64 || partial.numel() != kGradNormBlocks)
      args.fail("partial", std::to_string(kGradNormBlocks) + " float64 elements", std::to_string(partial.numel()));
    args.check_device(partial, "partial");
    GradNormParams p{};
    p.count = static_cast<int64_t>(grads.size());
    p.total = list.total;
    p.tensors = list.rows.data();
    p.table = list.table(table);
    p.grad_scale = scalar(args, grad_scale, "grad_scale");
    p.partial = reinterpret_cast<double*>(static_cast<char*>(partial.data) + partial.byte_offset);
    p.norm = static_cast<float*>(args.flat(norm, "norm", DType::float32, 1));
    if (list.refused.empty()) Backend::run(&Backend::Kernels::grad_norm, p, norm.device.index);
    return list.refused;
  });
}

}  // namespace torchweld
