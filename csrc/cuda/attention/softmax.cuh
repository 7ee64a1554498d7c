// The online softmax of the forward kernels, and the denominator of a row.
#pragma once

#include "cuda/attention/scores.cuh"

namespace torchweld::cuda::attention {

// For each of a lane's rows: the largest score so far, as kept, and this lane's share of the sum of exponentials. A row
// without a visible key has -inf and 0.
//
// The exponentials are exp2(score * scale_log2 - base): one instruction before exp2. base is max * scale_log2, rounded,
// so all exponentials of a row share one wrong factor, which finish() removes. Where base is large (kFar) the factor
// could be anything: there the maximum is subtracted first.
template <int MT>
struct Softmax {
  static constexpr float kFar = 128.0f;
  float max[MT][2], sum[MT][2];

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
      max[r / 2][r % 2] = -infinity();
      sum[r / 2][r % 2] = 0.0f;
    }
  }

  // Scores to exponentials relative to the new maximum. Earlier sums and outputs must be multiplied by `rescale`.
  template <int NT>
  __device__ __forceinline__ void exponentiate(float (&s)[MT][NT][4], float scale_log2, float (&rescale)[MT][2]) {
    float now[MT][2], base[MT][2];
    bool far = false;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = s[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < NT; ++n) largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        now[m][half] = fmaxf(max[m][half], largest);
        base[m][half] = __fmul_rn(finite_or_zero(now[m][half]), scale_log2);
        rescale[m][half] = ptx::exp2(__fmul_rn(max[m][half], scale_log2) - base[m][half]);
        far |= !is_near(base[m][half]);
      }
    if (__any_sync(0xffffffffu, far)) subtract_max_first(s, scale_log2, now, base, rescale);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        max[m][half] = now[m][half];
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            s[m][n][e] = ptx::exp2(__fmaf_rn(s[m][n][e], scale_log2, -base[m][half]));
            total += s[m][n][e];
          }
        sum[m][half] = sum[m][half] * rescale[m][half] + total;
      }
  }

  // As exponentiate(), and rescales `output`.
  template <int NT, int OT>
  __device__ __forceinline__ void merge(float (&s)[MT][NT][4], float (&output)[MT][OT][4], float scale_log2) {
    float factor[MT][2];
    exponentiate(s, scale_log2, factor);
    rescale(output, factor);
  }

  template <int OT>
  static __device__ __forceinline__ void rescale(float (&output)[MT][OT][4], const float (&factor)[MT][2]) {
    for_each<MT, OT>([&](int m, int n, int e) { output[m][n][e] *= factor[m][e / 2]; });
  }

  // Completes the sums of the rows and makes them, and `output`, relative to the maximum itself: a row with one
  // probability has the sum 1.
  template <int OT>
  __device__ __forceinline__ void finish(float (&output)[MT][OT][4], float scale_log2) {
    float factor[MT][2];
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
      const float most = finite_or_zero(max[r / 2][r % 2]), base = __fmul_rn(most, scale_log2);
      const float excess = ptx::exp2(is_near(base) ? __fmaf_rn(most, scale_log2, -base) : 0.0f);
      sum[r / 2][r % 2] = group_sum(sum[r / 2][r % 2], 4) / excess;
      factor[r / 2][r % 2] = 1.0f / excess;
    }
    rescale(output, factor);
  }

 private:
  static __device__ __forceinline__ bool is_near(float base) { return fabsf(base) < kFar; }

  template <int NT>
  __device__ __forceinline__ void subtract_max_first(float (&s)[MT][NT][4], float scale_log2, const float (&now)[MT][2],
                                                     float (&base)[MT][2], float (&rescale)[MT][2]) const {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (is_near(base[m][half])) continue;
        const float most = finite_or_zero(now[m][half]);
        rescale[m][half] = ptx::exp2((max[m][half] - most) * scale_log2);
        base[m][half] = 0.0f;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) s[m][n][e] -= most;
      }
  }
};

// The denominator of a row, given its maximum and its sum of exp(score - max). A sink (nullptr: none) adds one score
// without a value. The logarithm is taken relative to the larger of sink and maximum.
struct Denominator {
  float inverse, lse;  // 0 and -inf where the row sees nothing

  // max counts in units of 1 / score_scale.
  __device__ __forceinline__ Denominator(float max, float sum, float score_scale, const float* sink) {
    float top = max * score_scale, factor = 1.0f;
    if (sink != nullptr && *sink != -infinity()) {
      const float above = __fmaf_rn(max, score_scale, -*sink);
      if (above >= 0.0f) {
        sum += expf(-above);
      } else {
        factor = expf(above);
        sum = sum * factor + 1.0f;
        top = *sink;
      }
    }
    inverse = sum == 0.0f ? 0.0f : factor / sum;
    lse = sum == 0.0f ? -infinity() : top + logf(sum);
  }

  // Stores lse, maximum and inverse sum, those that are wanted, to row `row` of [B, H, Nq].
  __device__ __forceinline__ void store(const AttentionForwardParams& p, int64_t row, float max) const {
    if (p.lse != nullptr) p.lse[row] = lse;
    if (p.max == nullptr) return;
    p.max[row] = max;
    p.inverse[row] = inverse;
  }
};

}  // namespace torchweld::cuda::attention
