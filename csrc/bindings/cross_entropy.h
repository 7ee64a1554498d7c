// cross_entropy_forward, cross_entropy_backward: tensors -> params, for any backend.
#pragma once

#include "bindings/tensor.h"

namespace torchweld {

template <class Backend>
void bind_cross_entropy(py::module_& m) {
  // logits: (M, V); target: int64 (M), every one in [0, V) or ignore_index; loss: float32 (M); stats: float32 (2, M),
  // the rows' maxima and sums.
  m.def("cross_entropy_forward", [](const TensorView& logits, const TensorView& target, int64_t ignore_index,
                                    float smoothing, const TensorView& loss, const TensorView& stats) {
    const Arguments args("cross_entropy_forward", Backend::device, logits);
    if (logits.ndim != 2) args.fail("logits", "2 dimensions (rows, classes)", std::to_string(logits.ndim));
    CrossEntropyForwardParams p{};
    p.rows = logits.size(0);
    p.classes = logits.size(1);
    p.ignore_index = ignore_index;
    p.smoothing = smoothing;
    p.dtype = args.dtype(logits, "logits");
    p.logits = args.contiguous(logits, "logits", p.dtype, {p.rows, p.classes});
    p.target = args.indices(target, "target", p.rows);
    p.loss = static_cast<float*>(args.contiguous(loss, "loss", DType::float32, {p.rows}));
    p.max = static_cast<float*>(args.contiguous(stats, "stats", DType::float32, {2, p.rows}));
    p.sum = p.max + p.rows;
    Backend::run(&Backend::Kernels::cross_entropy_forward, p, logits.device.index);
  });

  m.def("cross_entropy_backward",
        [](const TensorView& dloss, const TensorView& logits, const TensorView& target, int64_t ignore_index,
           float smoothing, const TensorView& stats, const TensorView& dlogits) {
          const Arguments args("cross_entropy_backward", Backend::device, logits);
          if (logits.ndim != 2) args.fail("logits", "2 dimensions (rows, classes)", std::to_string(logits.ndim));
          CrossEntropyBackwardParams p{};
          p.rows = logits.size(0);
          p.classes = logits.size(1);
          p.ignore_index = ignore_index;
          p.smoothing = smoothing;
          p.dtype = args.dtype(logits, "logits");
          p.dloss = static_cast<const float*>(args.contiguous(dloss, "dloss", DType::float32, {p.rows}));
          p.logits = args.contiguous(logits, "logits", p.dtype, {p.rows, p.classes});
          p.target = args.indices(target, "target", p.rows);
          p.max = static_cast<const float*>(args.contiguous(stats, "stats", DType::float32, {2, p.rows}));
          p.sum = p.max + p.rows;
          p.dlogits = args.contiguous(dlogits, "dlogits", p.dtype, {p.rows, p.classes});
          Backend::run(&Backend::Kernels::cross_entropy_backward, p, logits.device.index);
        });
}

}  // namespace torchweld
