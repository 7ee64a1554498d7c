// Shared by layer norm's two directions: the weights as floats, rows, and the division of work.
#pragma once

#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd/dropout.h"
#include "cpu/simd/vec.h"

namespace torchweld::cpu {
namespace {

// Up to so many columns a thread keeps weights and one row as floats on its stack: each is converted once, not per
// pass.
constexpr int64_t kBufferedColumns = 8192;
constexpr float kNoBias = -0.0f;  // leaves every sum unchanged, also the sign of a zero

inline int64_t row_grain(int64_t cols) { return cols < kElementsPerThread ? kElementsPerThread / cols : 1; }

template <class T>
const T* row(const void* base, int64_t index, int64_t cols) {
  return static_cast<const T*>(base) + index * cols;
}
template <class T>
T* row(void* base, int64_t index, int64_t cols) {
  return static_cast<T*>(base) + index * cols;
}

// Weight with its offset, and bias, as floats that are converted once for many rows.
class BufferedWeights {
 public:
  BufferedWeights(const void* weight, const void* bias, DType dtype, float offset, int64_t cols) {
    fill(weight_, weight, dtype, offset, 1.0f, cols);
    fill(bias_, bias, dtype, 0.0f, kNoBias, cols);
  }
  template <class Lanes>
  TW_INLINE Vec weight(int64_t i, Lanes lanes) const {
    return load(weight_ + i, lanes);
  }
  template <class Lanes>
  TW_INLINE Vec bias(int64_t i, Lanes lanes) const {
    return load(bias_ + i, lanes);
  }

 private:
  static void fill(float* to, const void* from, DType dtype, float offset, float missing, int64_t cols) {
    dispatch(dtype, [&](auto tag) {
      const auto* p = static_cast<const typename decltype(tag)::type*>(from);
      for_each_vector(cols, [&](int64_t i, auto lanes) {
        store(to + i, p != nullptr ? load(p + i, lanes) + offset : splat(missing), lanes);
      });
    });
  }

  alignas(64) float weight_[kBufferedColumns], bias_[kBufferedColumns];
};

// The same, read from memory, for longer rows.
template <class WT>
class DirectWeights {
 public:
  DirectWeights(const void* weight, const void* bias, float offset)
      : weight_(static_cast<const WT*>(weight)), bias_(static_cast<const WT*>(bias)), offset_(offset) {}
  template <class Lanes>
  TW_INLINE Vec weight(int64_t i, Lanes lanes) const {
    return weight_ != nullptr ? load(weight_ + i, lanes) + offset_ : splat(1.0f);
  }
  template <class Lanes>
  TW_INLINE Vec bias(int64_t i, Lanes lanes) const {
    return bias_ != nullptr ? load(bias_ + i, lanes) : splat(kNoBias);
  }

 private:
  const WT *weight_, *bias_;
  const float offset_;
};

// f(Tag<T>, Tag<R>): the residual's type R is float32 or the activations' type T.
template <class F>
void dispatch_sum(DType dtype, DType sum_dtype, F&& f) {
  dispatch(dtype, [&](auto t) { sum_dtype == dtype ? f(t, t) : f(t, Tag<float>{}); });
}

// f(Tag<WT>): the weights' type is float32 or the activations' type T.
template <class T, class F>
TW_INLINE void dispatch_weights(DType dtype, DType weight_dtype, F&& f) {
  weight_dtype == dtype ? f(Tag<T>{}) : f(Tag<float>{});
}

}  // namespace
}  // namespace torchweld::cpu
