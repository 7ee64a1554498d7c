// Attention, forward, on Hopper; cpu/attention/forward.cpp has the formula, and README.md a drawn schedule.
//
// Block -> a tile of queries of one head, 64 per warpgroup. One more warpgroup loads. The products for scores read both
// operands from shared memory; the probabilities of a tile are the left operand of the next product, in registers. The
// scores of the next tile and the values of this tile are multiplied together: softmax overlaps with the latter, and
// with the products of the other warpgroups (ping-pong). Shah and others: FlashAttention-3, arXiv:2407.08608.
#pragma once

#include "cuda/attention/forward.cuh"
#include "cuda/attention/sm90/pipeline.cuh"

namespace torchweld::cuda::attention::sm90 {

// kGroups: warpgroups that multiply. At D 64 three fit the registers and hide more of the exponentials.
template <int D, bool kPlain, int kGroups>
struct ForwardShape {
  static constexpr int kThreads = (1 + kGroups) * kWarpgroup;
  static constexpr int kQueries = kGroups * 64, kKeys = kPlain && D <= 128 ? 128 : 64;
  static constexpr int kSlots = 4;
  static constexpr int kRegisters = kGroups == 3 ? 160 : 240, kLoaderRegisters = kGroups == 3 ? 32 : 24;
  using Queries = Panels<D, kQueries>;
  using Keys = Panels<D, kKeys>;
  using Pipeline = LoadPipeline<kSlots, kGroups * 4>;

  // Shared memory, from a multiple of 1024 bytes on.
  struct Memory {
    uint8_t queries[Queries::kBytes];
    uint8_t slots[kSlots][Keys::kBytes];
    typename Pipeline::Barriers barriers;
  };
  static constexpr int kBytes = AlignedMemory::kBytes + static_cast<int>(sizeof(Memory));
  static_assert(kBytes <= 227 * 1024);
};

// Items in the order in which they are used: keys are multiplied one tile ahead of values.
template <class Place>
struct ForwardItems {
  int steps;

  __device__ __forceinline__ Place key(int step) const { return Place::of(step == 0 ? 0 : 2 * step - 1); }
  __device__ __forceinline__ Place value(int step) const {
    return Place::of(step + 1 < steps ? 2 * step + 2 : 2 * step + 1);
  }
};

template <class T, int D, bool kPlain, int kGroups>
__global__ void __launch_bounds__(ForwardShape<D, kPlain, kGroups>::kThreads, 1)
    forward(const __grid_constant__ Forward p) {
  using Shape = ForwardShape<D, kPlain, kGroups>;
  constexpr int NT = Shape::kKeys / 8;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kQueries;
  if (i0 >= head.queries) return;

  const VisibleKeys<Shape::kKeys> visible(head, i0, Shape::kQueries);
  const int steps = visible.steps;
  const ForwardItems<typename Shape::Pipeline::Place> items{steps};
  using Memory = typename Shape::Memory;
  const uint32_t queries = AlignedMemory::begin(), slots = queries + static_cast<uint32_t>(offsetof(Memory, slots));
  const typename Shape::Pipeline pipeline{queries + static_cast<uint32_t>(offsetof(Memory, barriers))};
  auto slot = [&](int number) {
    return slots + static_cast<uint32_t>(number * static_cast<int>(sizeof(Memory::slots[0])));
  };
  pipeline.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    const Head head(p, ptx::opaque(static_cast<int>(work.head / p.heads)), static_cast<int>(work.head % p.heads));
    if (steps > 0)
      load_tile<T, D, Shape::kQueries, kWarpgroup, typename Shape::Queries>(
          queries, head.all_queries<T>(p.query, p.query_strides, p.dim, p.vectorized), i0);
    TileStream<T, D, Shape::kKeys> keys(
        head.keys_from<T>(p.key, p.key_strides, p.dim, visible.begin, visible.end, p.vectorized), visible.start);
    TileStream<T, D, Shape::kKeys> values(
        head.keys_from<T>(p.value, p.value_strides, p.value_dim, visible.begin, visible.end, p.vectorized),
        visible.start);
    typename Shape::Pipeline::Producer producer(pipeline);
    const int beyond = visible.start + steps * Shape::kKeys;
#pragma unroll 1
    for (int first = visible.start; first <= beyond; first += Shape::kKeys) {
      if (first < beyond) producer.load([&](int to) { keys.load(slot(to), first); });
      if (first > visible.start) producer.load([&](int to) { values.load(slot(to), first - Shape::kKeys); });
    }
    producer.finish();
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const PingPong<kGroups> ping_pong{warpgroup() - 1};
  const int first_row = i0 + ping_pong.group * 64, row0 = first_row + warp() % 4 * 16;
  float output[1][D / 8][4] = {}, rescale[1][2];
  Softmax<1> softmax;
  softmax.init();
  const float scale_log2 = scale_log2_of(p, kPlain);
  const bool uses_dropout = !kPlain && p.dropout.seed != nullptr;

  float s[1][NT][4];
  RegisterOperand<NT> probabilities;
  auto begin_scores = [&](int step) {
    ping_pong.wait_turn();
    ptx::wgmma_fence();
    begin_rows<T, D, Shape::kQueries>(s, queries, ping_pong.group * 64, slot(items.key(step).slot));
    ptx::wgmma_commit();
  };
  auto begin_values = [&](int step) {
    pipeline.wait(items.value(step));
    ptx::wgmma_fence();
    begin_columns<T, D>(output, probabilities, slot(items.value(step).slot));
    ptx::wgmma_commit();
  };
  auto softmax_of = [&](int step) {
    const int j0 = visible.start + step * Shape::kKeys;
    const ScorePositions<false> positions{head, row0, j0};
    const bool unmasked = head.all_visible(first_row, 64, j0, Shape::kKeys);
    if constexpr (!kPlain) modify_scores(p, positions, unmasked, s);
    if (!unmasked) mask_out(positions, s, -infinity());
    softmax.exponentiate(s, scale_log2, rescale);
    if (uses_dropout) {
      DropoutMask<false, 1, NT> keep;
      keep.generate(p.dropout, head.mask_begin, row0, j0);
      apply_dropout(s, keep);
    }
  };

  if (steps > 0) {
    ping_pong.start();
    pipeline.wait(items.key(0));
    begin_scores(0);
    steps > 1 ? ping_pong.pass() : ping_pong.finish();
    ptx::wgmma_wait<0>();
    pipeline.release(items.key(0));
    softmax_of(0);
    if (steps > 1) pipeline.wait(items.key(1));
    probabilities.template from_accumulator<T>(s);
#pragma unroll 1
    for (int step = 1; step < steps; ++step) {
      begin_scores(step);
      begin_values(step - 1);
      step + 1 < steps ? ping_pong.pass() : ping_pong.finish();
      ptx::wgmma_wait<1>();
      pipeline.release(items.key(step));
      softmax_of(step);
      if (step + 1 < steps)
        pipeline.wait(items.key(step + 1));  // waits here so that softmax overlaps the product with values: see wait()
      ptx::wgmma_wait<0>();
      pipeline.release(items.value(step - 1));
      softmax.rescale(output, rescale);
      probabilities.template from_accumulator<T>(s);
    }
    begin_values(steps - 1);
    ptx::wgmma_wait<0>();
  }

  // Normalise. Store.
  const float dropout_scale = uses_dropout ? p.dropout.scale : 1.0f;
  softmax.finish(output, scale_log2);
  const Head own(p, ptx::opaque(head.b), head.h);  // made again: the loop needs the registers
  T* out = own.query_rows(static_cast<T*>(p.output), p.output_strides);
  auto row_of = [&](int half) { return row0 + lane_row() + half * 8; };
  auto denominator = [&](int half) {
    return Denominator(softmax.max[0][half], softmax.sum[0][half], score_scale_of(p, kPlain),
                       p.sinks != nullptr ? p.sinks + own.h : nullptr);
  };
  store_rows<T>(
      output, static_cast<int>(p.value_dim), p.pairs,
      [&](int, int half) { return row_of(half) < own.queries ? out + row_of(half) * p.output_strides.row : nullptr; },
      [&](int, int half) { return denominator(half).inverse * dropout_scale; });
  if (lane_column() != 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (row_of(half) < own.queries)
      denominator(half).store(p, own.statistics_begin + row_of(half), softmax.max[0][half]);
}

// True if three warpgroups per block take less time than two. The time of a block is taken as its number of rows: few
// queries fill the last tile of a head badly, and few heads the last wave of blocks.
inline bool prefers_three_groups(const AttentionForwardParams& p) {
  const int64_t blocks_at_once = multiprocessors(current_device());
  auto time = [&](int64_t groups) {
    const int64_t blocks = p.batch * p.heads * ((p.queries + 64 * groups - 1) / (64 * groups));
    return (blocks + blocks_at_once - 1) / blocks_at_once * groups;
  };
  return 10 * time(3) <= 11 * time(2);  // three warpgroups save about a tenth
}

template <class T, int D, bool kPlain, int kGroups>
void launch_forward(const AttentionForwardParams& params, Stream stream) {
  using Shape = ForwardShape<D, kPlain, kGroups>;
  attention::launch_forward<T>(params, Shape::kQueries, forward<T, D, kPlain, kGroups>, Shape::kThreads, Shape::kBytes,
                               stream);
}

template <class T, int D, bool kPlain>
void launch_forward(const AttentionForwardParams& params, Stream stream) {
  if constexpr (kPlain && D <= 64)
    if (prefers_three_groups(params)) return launch_forward<T, D, kPlain, 3>(params, stream);
  launch_forward<T, D, kPlain, 2>(params, stream);
}

}  // namespace torchweld::cuda::attention::sm90
