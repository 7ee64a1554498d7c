// Attention, forward; cpu/attention/forward.cpp has the formula.
//
// Block -> a tile of queries of one head, 16 or 32 rows to a warp. It walks over the tiles of keys that it can see with
// the online softmax (Milakov, Gimelshein, arXiv:1805.02867), scores and output in registers: the weights of one tile
// become the left operand of the next product where they are. Only tiles that cross the edge of the band are masked.
// 2 Nq Nk (D + Dv) FLOPs per head; every block reads the keys and values that it sees, out of L2 (see Schedule).
// Dao: FlashAttention-2, arXiv:2307.08691.
#pragma once

#include "cuda/attention/dropout.cuh"
#include "cuda/attention/products.cuh"
#include "cuda/attention/schedule.cuh"
#include "cuda/attention/sm80/ring.cuh"

namespace torchweld::cuda {

struct Forward : AttentionForwardParams {
  Schedule schedule;
  bool packets;  // all rows of query, key and value begin on 16 bytes
  bool pairs;    // all rows of output begin on two elements
};

// Sizes are such that a block fits the 99 KB of shared memory of sm_86 and sm_89.
template <class T, int D, bool kPlain>
struct ForwardShape {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kWarps = 4, kThreads = kWarps * kLanes;
  static constexpr int MT = kPlain && !kWide && D <= 128 ? 2 : 1;
  static constexpr int kQueries = kWarps * MT * 16;
  static constexpr int kKeys = kWide      ? (D <= 64    ? 64
                                             : D <= 128 ? 32
                                                        : 16)
                               : D <= 64  ? 64
                               : D <= 128 ? (kPlain ? 48 : 64)
                                          : 32;
  static constexpr int kSlots = D <= 128 ? 3 : kWide ? 2 : 4;
  static constexpr int kQueryBytes = kQueries * Tile<T, D>::kRowBytes;
  static constexpr int kBytes = kQueryBytes + kSlots * kKeys * Tile<T, D>::kRowBytes;
  static_assert(kBytes <= 99 * 1024);
};

// Of a lane's rows: the largest score so far, as it is, and its share of the sum of weights. A row that has seen
// nothing has -inf and 0.
//
// Weights are exp2(score * unit - base), a single instruction before exp2, base being max * unit rounded. So all of a
// row are too large by one factor, 2 to what the rounding took, until `settle`. Far from zero that could be anything:
// there the maximum is subtracted first.
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

  // Scores to weights, relative to the new maximum: what was added up before counts `rescale` times from now on.
  template <int NT>
  __device__ __forceinline__ void weigh(float (&s)[MT][NT][4], float unit, float (&rescale)[MT][2]) {
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
        base[m][half] = __fmul_rn(finite(now[m][half]), unit);
        rescale[m][half] = ptx::exp2(__fmul_rn(max[m][half], unit) - base[m][half]);
        far |= !is_near(base[m][half]);
      }
    if (__any_sync(0xffffffffu, far)) subtract_first(s, unit, now, base, rescale);
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
            s[m][n][e] = ptx::exp2(__fmaf_rn(s[m][n][e], unit, -base[m][half]));
            total += s[m][n][e];
          }
        sum[m][half] = sum[m][half] * rescale[m][half] + total;
      }
  }

  // Scores to weights; `output` is rescaled to the new maximum.
  template <int NT, int OT>
  __device__ __forceinline__ void merge(float (&s)[MT][NT][4], float (&output)[MT][OT][4], float unit) {
    float factor[MT][2];
    weigh(s, unit, factor);
    rescale(output, factor);
  }

  template <int OT>
  static __device__ __forceinline__ void rescale(float (&output)[MT][OT][4], const float (&factor)[MT][2]) {
    for_each<MT, OT>([&](int m, int n, int e) { output[m][n][e] *= factor[m][e / 2]; });
  }

  // Sums of whole rows, and with them `output`, relative to the maximum itself: a row of one weight has the sum 1.
  template <int OT>
  __device__ __forceinline__ void settle(float (&output)[MT][OT][4], float unit) {
    float factor[MT][2];
#pragma unroll
    for (int r = 0; r < 2 * MT; ++r) {
      const float most = finite(max[r / 2][r % 2]), base = __fmul_rn(most, unit);
      const float excess = ptx::exp2(is_near(base) ? __fmaf_rn(most, unit, -base) : 0.0f);
      sum[r / 2][r % 2] = group_sum(sum[r / 2][r % 2], 4) / excess;
      factor[r / 2][r % 2] = 1.0f / excess;
    }
    rescale(output, factor);
  }

 private:
  static __device__ __forceinline__ bool is_near(float base) { return fabsf(base) < kFar; }

  template <int NT>
  __device__ __forceinline__ void subtract_first(float (&s)[MT][NT][4], float unit, const float (&now)[MT][2],
                                                 float (&base)[MT][2], float (&rescale)[MT][2]) const {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (is_near(base[m][half])) continue;
        const float most = finite(now[m][half]);
        rescale[m][half] = ptx::exp2((max[m][half] - most) * unit);
        base[m][half] = 0.0f;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) s[m][n][e] -= most;
      }
  }
};

// What a row's weights exp(score - max), which add up to `sum`, are divided by. A sink (nullptr: none) is one more
// score, of no value; what is larger, it or the maximum, is what the logarithm is relative to.
struct Denominator {
  float inverse, lse;  // 0 and -inf where there is nothing to divide

  // A score is `natural` times what `max` counts.
  __device__ __forceinline__ Denominator(float max, float sum, float natural, const float* sink) {
    float top = max * natural, factor = 1.0f;
    if (sink != nullptr && *sink != -infinity()) {
      const float above = __fmaf_rn(max, natural, -*sink);
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

  // What is wanted of it, and of the maximum, to row `row` of [B, H, Nq].
  __device__ __forceinline__ void store(const AttentionForwardParams& p, int64_t row, float max) const {
    if (p.lse != nullptr) p.lse[row] = lse;
    if (p.max == nullptr) return;
    p.max[row] = max;
    p.inverse[row] = inverse;
  }
};

template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(ForwardShape<T, D, kPlain>::kThreads, 2) attend(const __grid_constant__ Forward p) {
  if (kOnHopper<T, D>) return;
  using Shape = ForwardShape<T, D, kPlain>;
  constexpr int MT = Shape::MT, NT = Shape::kKeys / 8, kThreads = Shape::kThreads;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kQueries, row0 = i0 + warp() * MT * 16;
  if (i0 >= head.queries) return;

  const SeenKeys<Shape::kKeys> seen(head, i0, Shape::kQueries);
  const Rows<T> key = head.keys_from<T>(p.key, p.key_strides, p.dim, seen.begin, seen.end, p.packets);
  const Rows<T> value = head.keys_from<T>(p.value, p.value_strides, p.value_dim, seen.begin, seen.end, p.packets);
  const uint32_t queries = ptx::shared_base();
  const Ring<T, D, Shape::kKeys, Shape::kSlots, kThreads, Rows<T>> ring{queries + Shape::kQueryBytes, key, value,
                                                                        seen.start, seen.steps};
  if (seen.steps > 0)
    load_tile<T, D, Shape::kQueries, kThreads>(queries, head.all_queries<T>(p.query, p.query_strides, p.dim, p.packets),
                                               i0);
  ring.fill();

  float output[MT][D / 8][4] = {};
  Softmax<MT> softmax;
  softmax.init();
  const float unit = unit_of(p, kPlain);
  const bool drops = !kPlain && p.dropout.seed != nullptr;
  for (int step = 0; step < seen.steps; ++step) {
    const int j0 = seen.start + step * Shape::kKeys;

    // Scores.
    float s[MT][NT][4];
    const uint32_t keys = ring.advance(2 * step);
    multiply_rows<T, D>(s, queries + warp() * MT * 16 * Tile<T, D>::kRowBytes, keys);
    const Cells<false> cells{head, row0, j0};
    const bool whole = head.sees_all(i0, Shape::kQueries, j0, Shape::kKeys);
    if constexpr (!kPlain) modify(p, cells, whole, s);
    if (!whole) hide(cells, s, -infinity());

    // Weights.
    softmax.merge(s, output, unit);
    if (drops) {
      Kept<false, MT, NT> kept;
      kept.draw(p.dropout, head.values, row0, j0);
      drop(s, kept);
    }

    // Values.
    multiply_columns<T, D>(output, s, ring.advance(2 * step + 1), static_cast<int>(p.value_dim));
  }

  // Normalise. Store.
  const float kept = drops ? p.dropout.scale : 1.0f;
  softmax.settle(output, unit);
  T* out = head.query_rows(static_cast<T*>(p.output), p.output_strides);
  auto row_of = [&](int m, int half) { return row0 + m * 16 + lane_row() + half * 8; };
  auto denominator = [&](int m, int half) {
    return Denominator(softmax.max[m][half], softmax.sum[m][half], natural_of(p, kPlain),
                       p.sinks != nullptr ? p.sinks + head.h : nullptr);
  };
  store_rows<T>(
      output, static_cast<int>(p.value_dim), p.pairs,
      [&](int m, int half) {
        return row_of(m, half) < head.queries ? out + row_of(m, half) * p.output_strides.row : nullptr;
      },
      [&](int m, int half) { return denominator(m, half).inverse * kept; });
  if (lane_column() != 0) return;
#pragma unroll
  for (int r = 0; r < 2 * MT; ++r)
    if (row_of(r / 2, r % 2) < head.queries)
      denominator(r / 2, r % 2).store(p, head.values + row_of(r / 2, r % 2), softmax.max[r / 2][r % 2]);
}

template <class T>
void launch_forward(const AttentionForwardParams& params, int tile, void (*kernel)(Forward), int threads, size_t shared,
                    Stream stream) {
  Forward p{params};
  p.schedule = Schedule(p.batch * p.heads, p.queries, tile, p.heads / p.kv_heads,
                        p.keys * (p.dim + p.value_dim) * sizeof(T), false);
  if (p.schedule.empty()) return;
  p.packets =
      rows_begin_on(16, sizeof(T), {p.query, p.key, p.value}, {p.query_strides, p.key_strides, p.value_strides});
  p.pairs = rows_begin_on(2 * sizeof(T), sizeof(T), {p.output}, {p.output_strides});
  launch("attention_forward", kernel, p.schedule.grid(), dim3(threads), shared, stream, p);
}

template <class T, int D, bool kPlain>
void launch_forward(const AttentionForwardParams& params, Stream stream) {
  using Shape = ForwardShape<T, D, kPlain>;
  launch_forward<T>(params, Shape::kQueries, attend<T, D, kPlain>, Shape::kThreads, Shape::kBytes, stream);
}

}  // namespace torchweld::cuda
