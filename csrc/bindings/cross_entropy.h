// cross_entropy_forward, cross_entropy_backward: tensors -> params, for any backend.
#pragma once

#include "bindings/tensor.h"
#include "params/loss.h"

namespace torchweld {

// Targets must be in [0, V), or ignore_index, for the forward kernels read the logit of the target.
template <class Params>
void check_classes(const char* op, const Params& p) {
  for (int64_t m = 0; m < p.rows; ++m) {
    const int64_t target = p.target[m];
    if ((target < 0 || target >= p.classes) && target != p.ignore_index)
      throw py::index_error("[" + std::string(op) + "] target: expected classes in [0, " + std::to_string(p.classes) +
                            ") or ignore_index " + std::to_string(p.ignore_index) + ", but got " +
                            std::to_string(target) + " in row " + std::to_string(m));
  }
}

// Unpacks what both directions share.
inline void fill_cross_entropy(const Arguments& args, CrossEntropyParams& p, const TensorView& logits,
                               const TensorView& target, int64_t ignore_index, float smoothing) {
  if (logits.ndim != 2) args.fail("logits", "2 dimensions [rows, classes]", std::to_string(logits.ndim));
  if (logits.size(0) > 0 && logits.size(1) < 1) args.fail("logits", "at least one class", "none");
  p.rows = logits.size(0);
  p.classes = logits.size(1);
  p.ignore_index = ignore_index;
  p.smoothing = smoothing;
  p.dtype = args.dtype(logits, "logits");
  p.logits = args.contiguous(logits, "logits", p.dtype, {p.rows, p.classes});
  p.target = args.indices(target, "target", p.rows);
}

template <class Backend>
void bind_cross_entropy(Module& m) {
  // logits: (M, V); target: int64 (M); loss: float32 (M); stats: float32 (2, M), the rows' maxima and sums.
  m.def("cross_entropy_forward(logits, target, ignore_index, smoothing, loss, stats)",
        [](const TensorView& logits, const TensorView& target, int64_t ignore_index, float smoothing,
           const TensorView& loss, const TensorView& stats) {
          const Arguments args("cross_entropy_forward", Backend::device, logits);
          CrossEntropyForwardParams p{};
          fill_cross_entropy(args, p, logits, target, ignore_index, smoothing);
          if (Backend::reads_tensors) check_classes("cross_entropy", p);
          p.loss = static_cast<float*>(args.contiguous(loss, "loss", DType::float32, {p.rows}));
          p.max = static_cast<float*>(args.contiguous(stats, "stats", DType::float32, {2, p.rows}));
          p.sum = p.max + p.rows;
          Backend::run(&Backend::Kernels::cross_entropy_forward, p, logits.device.index);
        });

  m.def("cross_entropy_backward(dloss, logits, target, ignore_index, smoothing, stats, dlogits)",
        [](const TensorView& dloss, const TensorView& logits, const TensorView& target, int64_t ignore_index,
           float smoothing, const TensorView& stats, const TensorView& dlogits) {
          const Arguments args("cross_entropy_backward", Backend::device, logits);
          CrossEntropyBackwardParams p{};
          fill_cross_entropy(args, p, logits, target, ignore_index, smoothing);
          p.dloss = static_cast<const float*>(args.contiguous(dloss, "dloss", DType::float32, {p.rows}));
          p.max = static_cast<const float*>(args.contiguous(stats, "stats", DType::float32, {2, p.rows}));
          p.sum = p.max + p.rows;
          p.dlogits = args.contiguous(dlogits, "dlogits", p.dtype, {p.rows, p.classes});
          Backend::run(&Backend::Kernels::cross_entropy_backward, p, logits.device.index);
        });
}

}  // namespace torchweld
