// Lists of tensors -> rows of an optimizer's list, for any backend. All checks come before memory is touched.
#pragma once

#include <algorithm>
#include <utility>

#include "bindings/tensor.h"
#include "params/optimizer.h"

namespace torchweld {

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

// Whether the elements fill their memory without gaps or overlaps, in any order of the dimensions.
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

inline bool is_complex(const TensorView& t) { return t.dtype.code == dlpack::kComplex; }

// Whether the reference computes in this dtype.
inline bool is_number(dlpack::DataType t) {
  return (t.code == dlpack::kFloat || t.code == dlpack::kBfloat || t.code == dlpack::kComplex) && t.bits >= 16;
}

// The rows of a list, and the tensors that the kernels do not take.
template <class Backend>
class OptimizerRows {
 public:
  // int64 elements of workspace for each tensor. The CPU kernels read the rows in place and need none.
  static constexpr int64_t words = Backend::optimizer_table ? sizeof(OptimizerTensor) / 8 : 0;
  static_assert(sizeof(OptimizerTensor) % 8 == 0, "a row of the table is a whole number of 64-bit words");

  OptimizerRows(const Arguments& args, const TensorList& first) : rows(first.size()), args_(args), first_(first) {}

  void check_length(const TensorList& list, const char* name) const {
    if (list.size() != rows.size())
      args_.fail(name, std::to_string(rows.size()) + " tensors, as many as params", std::to_string(list.size()));
  }

  // Memory of list[i]. Raises if the tensor does not fit its parameter, and refuses what a kernel does not take.
  void* memory(const TensorList& list, size_t i, const char* name, DType* dtype) {
    const TensorView &t = list[i], &twin = first_[i];
    if (!args_.is_here(t)) args_.check_device(t, label(name, i).c_str());
    if (!is_number(t.dtype))
      args_.fail(label(name, i).c_str(), "a floating-point dtype of 16 bits or more", name_of(t.dtype));
    if (is_complex(t) != is_complex(twin))
      args_.fail(label(name, i).c_str(), "a dtype that goes with " + name_of(twin.dtype), name_of(t.dtype));
    if (const auto found = dtype_of(t.dtype))
      *dtype = *found;
    else
      refuse(i, std::string(name) + " of dtype " + name_of(t.dtype));
    if (!same_shape(t, twin))
      args_.fail(label(name, i).c_str(), "shape " + Arguments::list(twin.shape, twin.ndim),
                 Arguments::list(t.shape, t.ndim));
    if (list.is_negated(i)) refuse(i, std::string(name) + " that are lazily negated");
    if (!same_strides(t, twin)) refuse(i, std::string(name) + " with other strides than the parameter");
    return static_cast<char*>(t.data) + t.byte_offset;
  }

  // Parameter, gradient and master of row i, whose dtypes must go together.
  void base(const TensorList& params, const TensorList& grads, const TensorList& masters, size_t i) {
    OptimizerTensor& row = rows[i];
    row.param = memory(params, i, "params", &row.dtype);
    row.grad = memory(grads, i, "grads", &row.grad_dtype);
    row.state_dtype = row.dtype;  // of an optimizer that keeps no state
    if (!is_dense(params[i])) refuse(i, "params with gaps or overlaps in memory");
    if (row.grad_dtype != row.dtype && row.grad_dtype != DType::float32) refuse_mixture(i, "grads", row.grad_dtype);
    if (!masters.empty()) {
      DType dtype = DType::float32;
      row.master = static_cast<float*>(memory(masters, i, "masters", &dtype));
      if (dtype != DType::float32) refuse_mixture(i, "masters", dtype);
    }
  }

  // Another tensor of row i's state. All of them have one dtype.
  void state(const TensorList& list, int slot, const char* name, size_t i) {
    OptimizerTensor& row = rows[i];
    DType dtype = row.dtype;
    row.state[slot] = memory(list, i, name, &dtype);
    if (slot == 0) row.state_dtype = dtype;
    if (dtype != row.dtype && dtype != DType::float32) refuse_mixture(i, name, dtype);
    if (dtype != row.state_dtype) refuse(i, std::string(name) + " of another dtype than the rest of the state");
  }

  void step(const TensorList& steps, size_t i) {
    const TensorView& t = steps[i];
    if (!args_.is_here(t)) args_.check_device(t, label("steps", i).c_str());
    if (t.numel() != 1)
      args_.fail(label("steps", i).c_str(), "one element", "shape " + Arguments::list(t.shape, t.ndim));
    if (is_complex(t) || t.dtype.bits < 16) args_.fail(label("steps", i).c_str(), "dtype float32", name_of(t.dtype));
    if (dtype_of(t.dtype) != DType::float32) refuse(i, "steps of dtype " + name_of(t.dtype));
    rows[i].step = reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset);
  }

  // Sets the place of row i in the concatenation.
  void place(size_t i) {
    rows[i].numel = first_[i].numel();
    rows[i].begin = total;
    total += (rows[i].numel + chunk - 1) / chunk * chunk;
  }

  // Refuses parameters that share memory, and a parameter that is listed twice: they must be stepped one by one.
  void refuse_shared() {
    struct Extent {
      const char *begin, *end;
      size_t row;
    };
    std::vector<Extent> extents;
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto* begin = static_cast<const char*>(rows[i].param);
      const int64_t bytes = rows[i].numel * (rows[i].dtype == DType::float32 ? 4 : 2);
      if (bytes > 0) extents.push_back({begin, begin + bytes, i});
    }
    std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    for (size_t last = 0, next = 1; next < extents.size(); ++next) {
      if (extents[next].begin < extents[last].end)
        for (const size_t each : {last, next}) refuse(extents[each].row, "params that share memory");
      if (extents[next].end > extents[last].end) last = next;
    }
  }

  void refuse(size_t i, const std::string& reason) {
    const auto index = static_cast<int64_t>(i);
    if (refused.empty() || refused.back().first != index) refused.emplace_back(index, reason);
  }

  // Memory for a copy of the rows on the device. The CPU needs none.
  OptimizerTensor* table(const std::optional<TensorView>& workspace) const {
    if (!Backend::optimizer_table) return nullptr;
    const int64_t needed = words * static_cast<int64_t>(rows.size());
    if (!workspace) args_.fail("table", std::to_string(needed) + " int64 elements", "None");
    return reinterpret_cast<OptimizerTensor*>(args_.indices(*workspace, "table", needed));
  }

  std::vector<OptimizerTensor> rows;
  Refusals refused;
  int64_t total = 0;

 private:
  static constexpr int64_t chunk = Backend::optimizer_table ? kOptimizerChunkCuda : kOptimizerChunkCpu;

  void refuse_mixture(size_t i, const char* name, DType dtype) {
    refuse(i, std::string(name) + " of dtype " + name_of(dtype) + " beside params of " + name_of(rows[i].dtype));
  }

  static std::string label(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

  const Arguments& args_;
  const TensorList& first_;
};

}  // namespace torchweld
