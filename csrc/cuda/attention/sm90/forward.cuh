// Attention, forward, on Hopper; sm80/forward.cuh has the formula.
//
// Block -> a tile of queries of one head, 64 to a warpgroup; one warpgroup more loads. Scores come of wgmma with both
// operands in shared memory, the weights of a tile are the left operand of the next product in registers. Products of
// scores of the next tile and of the values of this one are on their way together: softmax runs beside the latter, and
// beside the products of the other warpgroups, with whom turns are taken.
// Shah and others: FlashAttention-3, arXiv:2407.08608.
#pragma once

#include "cuda/attention/sm80/forward.cuh"
#include "cuda/attention/sm90/ring.cuh"

namespace torchweld::cuda {

// kGroups: warpgroups that multiply. Three, for which there are registers at D 64, hide more of the exponentials.
template <int D, bool kPlain, int kGroups>
struct ForwardShapeSm90 {
  static constexpr int kThreads = (1 + kGroups) * kWarpgroup;
  static constexpr int kQueries = kGroups * 64, kKeys = kPlain && D <= 128 ? 128 : 64;
  static constexpr int kSlots = 4;
  static constexpr int kRegisters = kGroups == 3 ? 160 : 240, kLoaderRegisters = kGroups == 3 ? 32 : 24;
  using Queries = Panels<D, kQueries>;
  using Keys = Panels<D, kKeys>;
  using Ring = Slots<kSlots, kGroups * 4>;
  static constexpr int kBytes = AlignedMemory::kBytes + Queries::kBytes + kSlots * Keys::kBytes + Ring::kBarrierBytes;
  static_assert(kBytes <= 227 * 1024);
};

// Items in the order in which they are wanted: keys are multiplied one tile ahead of values.
struct ForwardItems {
  int steps;

  __device__ __forceinline__ int key(int step) const { return step == 0 ? 0 : 2 * step - 1; }
  __device__ __forceinline__ int value(int step) const { return step + 1 < steps ? 2 * step + 2 : 2 * step + 1; }
  __device__ __forceinline__ bool is_key(int item) const {
    return item == 0 || (item % 2 != 0 && item < 2 * steps - 1);
  }
  __device__ __forceinline__ int step(int item) const { return is_key(item) ? (item + 1) / 2 : (item - 1) / 2; }
};

template <class T, int D, bool kPlain, int kGroups>
__global__ void __launch_bounds__(ForwardShapeSm90<D, kPlain, kGroups>::kThreads, 1)
    attend_sm90(const __grid_constant__ Forward p) {
  using Shape = ForwardShapeSm90<D, kPlain, kGroups>;
  constexpr int NT = Shape::kKeys / 8;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kQueries;
  if (i0 >= head.queries) return;

  const SeenKeys<Shape::kKeys> seen(head, i0, Shape::kQueries);
  const int steps = seen.steps;
  const ForwardItems items{steps};
  const uint32_t queries = AlignedMemory::begin(), slots = queries + Shape::Queries::kBytes;
  const typename Shape::Ring ring{slots + Shape::kSlots * Shape::Keys::kBytes};
  auto slot = [&](int item) { return slots + static_cast<uint32_t>(item % Shape::kSlots * Shape::Keys::kBytes); };
  ring.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    if (steps > 0)
      load_tile<T, D, Shape::kQueries, kWarpgroup, typename Shape::Queries>(
          queries, head.all_queries<T>(p.query, p.query_strides, p.dim, p.packets), i0);
    ring.fill(2 * steps, [&](int item) {
      const Rows<T> rows =
          items.is_key(item)
              ? head.keys_from<T>(p.key, p.key_strides, p.dim, seen.begin, seen.end, p.packets)
              : head.keys_from<T>(p.value, p.value_strides, p.value_dim, seen.begin, seen.end, p.packets);
      load_tile<T, D, Shape::kKeys, kWarpgroup, typename Shape::Keys>(slot(item), rows,
                                                                      seen.start + items.step(item) * Shape::kKeys);
    });
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const Turns<kGroups> turns{warpgroup() - 1};
  const int first_row = i0 + turns.group * 64, row0 = first_row + warp() % 4 * 16;
  float output[1][D / 8][4] = {}, rescale[1][2];
  Softmax<1> softmax;
  softmax.init();
  const float unit = unit_of(p, kPlain);
  const bool drops = !kPlain && p.dropout.seed != nullptr;

  float s[1][NT][4];
  Lefts<NT> weights;
  auto begin_scores = [&](int step) {
    turns.take();
    ptx::wgmma_fence();
    begin_rows<T, D, Shape::kQueries>(s, queries, turns.group * 64, slot(items.key(step)));
    ptx::wgmma_commit();
  };
  auto begin_values = [&](int step) {
    ring.await(items.value(step));
    ptx::wgmma_fence();
    begin_columns<T, D>(output, weights, slot(items.value(step)));
    ptx::wgmma_commit();
  };
  auto weigh = [&](int step) {
    const int j0 = seen.start + step * Shape::kKeys;
    const Cells<false> cells{head, row0, j0};
    const bool whole = head.sees_all(first_row, 64, j0, Shape::kKeys);
    if constexpr (!kPlain) modify(p, cells, whole, s);
    if (!whole) hide(cells, s, -infinity());
    softmax.weigh(s, unit, rescale);
    if (drops) {
      Kept<false, 1, NT> kept;
      kept.draw(p.dropout, head.values, row0, j0);
      drop(s, kept);
    }
  };

  if (steps > 0) {
    turns.begin();
    ring.await(items.key(0));
    begin_scores(0);
    steps > 1 ? turns.pass() : turns.end();
    ptx::wgmma_wait<0>();
    ring.release(items.key(0));
    weigh(0);
    if (steps > 1) ring.await(items.key(1));
    weights.template take<T>(s);
#pragma unroll 1
    for (int step = 1; step < steps; ++step) {
      begin_scores(step);
      begin_values(step - 1);
      step + 1 < steps ? turns.pass() : turns.end();
      ptx::wgmma_wait<1>();
      ring.release(items.key(step));
      weigh(step);
      if (step + 1 < steps) ring.await(items.key(step + 1));  // here, so that weights are made beside values: see await
      ptx::wgmma_wait<0>();
      ring.release(items.value(step - 1));
      softmax.rescale(output, rescale);
      weights.template take<T>(s);
    }
    begin_values(steps - 1);
    ptx::wgmma_wait<0>();
  }

  // Normalise. Store.
  const float kept = drops ? p.dropout.scale : 1.0f;
  softmax.settle(output, unit);
  T* out = head.query_rows(static_cast<T*>(p.output), p.output_strides);
  auto row_of = [&](int half) { return row0 + lane_row() + half * 8; };
  auto denominator = [&](int half) {
    return Denominator(softmax.max[0][half], softmax.sum[0][half], natural_of(p, kPlain),
                       p.sinks != nullptr ? p.sinks + head.h : nullptr);
  };
  store_rows<T>(
      output, static_cast<int>(p.value_dim), p.pairs,
      [&](int, int half) { return row_of(half) < head.queries ? out + row_of(half) * p.output_strides.row : nullptr; },
      [&](int, int half) { return denominator(half).inverse * kept; });
  if (lane_column() != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (row_of(half) < head.queries) denominator(half).store(p, head.values + row_of(half), softmax.max[0][half]);
}

// Whether tiles of three warpgroups take less time than those of two, a tile's time being that of its rows: the last
// tile of a head is filled badly by few rows, and the last wave of blocks by few heads.
inline bool takes_three(const AttentionForwardParams& p) {
  const int64_t blocks_at_once = multiprocessors(current_device());
  auto time = [&](int64_t groups) {
    const int64_t blocks = p.batch * p.heads * ((p.queries + 64 * groups - 1) / (64 * groups));
    return (blocks + blocks_at_once - 1) / blocks_at_once * groups;
  };
  return 10 * time(3) <= 11 * time(2);  // what three hide makes up for a tenth
}

template <class T, int D, bool kPlain, int kGroups>
void launch_forward_sm90(const AttentionForwardParams& params, Stream stream) {
  using Shape = ForwardShapeSm90<D, kPlain, kGroups>;
  launch_forward<T>(params, Shape::kQueries, attend_sm90<T, D, kPlain, kGroups>, Shape::kThreads, Shape::kBytes,
                    stream);
}

template <class T, int D, bool kPlain>
void launch_forward_sm90(const AttentionForwardParams& params, Stream stream) {
  if constexpr (kPlain && D <= 64)
    if (takes_three(params)) return launch_forward_sm90<T, D, kPlain, 3>(params, stream);
  launch_forward_sm90<T, D, kPlain, 2>(params, stream);
}

}  // namespace torchweld::cuda
