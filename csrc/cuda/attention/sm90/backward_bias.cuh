// The kernel backward_bias on Hopper: as in sm80/, with wgmma, and the loads of the next tile overlap the products.
#pragma once

#include "cuda/attention/backward_bias.cuh"
#include "cuda/attention/sm90/pipeline.cuh"

namespace torchweld::cuda::attention::sm90 {

// Items 4n to 4n + 3 are the queries, keys, doutput and values of tile n of scores.
template <int D>
struct BiasShape {
  static constexpr int kGroups = 2, kThreads = (1 + kGroups) * kWarpgroup, kRows = 128, kKeys = 128;
  static constexpr int kSlots = D <= 64 ? 8 : D <= 128 ? 6 : 3;
  static constexpr int kRegisters = 240, kLoaderRegisters = 24;
  using Item = Panels<D, 128>;
  using Pipeline = LoadPipeline<kSlots, kGroups * 4>;

  // Shared memory, from a multiple of 1024 bytes on. After the loop the slots hold BiasTile::Sums.
  struct Memory {
    uint8_t slots[kSlots][Item::kBytes];
    typename Pipeline::Barriers barriers;
  };
  static constexpr int kBytes = AlignedMemory::kBytes + static_cast<int>(sizeof(Memory));
  static_assert(kBytes <= 227 * 1024 && sizeof(typename BiasTile<kRows, kKeys>::Sums) <= sizeof(Memory::slots));
};

template <class T, int D>
__global__ void __launch_bounds__(BiasShape<D>::kThreads, 1) backward_bias(const __grid_constant__ Backward p) {
  using Shape = BiasShape<D>;
  using Memory = typename Shape::Memory;
  constexpr int NT = Shape::kKeys / 8;
  const BiasTile<Shape::kRows, Shape::kKeys> tile(p, blockIdx.x);
  const uint32_t slots = AlignedMemory::begin();
  const typename Shape::Pipeline pipeline{slots + static_cast<uint32_t>(offsetof(Memory, barriers))};
  auto slot = [&](int number) {
    return slots + static_cast<uint32_t>(number * static_cast<int>(sizeof(Memory::slots[0])));
  };
  pipeline.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    typename Shape::Pipeline::Producer producer(pipeline);
    tile.for_each_score([&](const Head& head, int i0, int j0) {
      const VisibleKeys<1> visible(head, i0, Shape::kRows);
      const BackwardRows<T> all(p, head, visible.begin, visible.end);
#pragma unroll 1
      for (int which = 0; which < 4; ++which)
        producer.load([&](int to) {
          const Rows<T> queries = which < 2 ? Rows<T>(all.query) : Rows<T>(all.doutput);
          const Rows<T> keys = which < 2 ? Rows<T>(all.key) : Rows<T>(all.value);
          const Rows<T> rows = which % 2 == 0 ? Rows<T>(queries) : Rows<T>(keys);
          load_tile<T, D, 128, kWarpgroup, typename Shape::Item>(slot(to), rows, which % 2 == 0 ? i0 : j0);
        });
    });
    producer.finish();
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const int row = (warpgroup() - 1) * 64, warp_row = row + warp() % 4 * 16;
  float sum[1][NT][4] = {};
  using Pair = RingPair<Shape::kSlots>;
  Pair items{};
  tile.for_each_score([&](const Head& head, int i0, int j0) {
    // Products.
    float s[1][NT][4], ds[1][NT][4];
    auto begin = [&](float (&acc)[1][NT][4], const Pair& pair) {
      pipeline.wait(pair.first);
      pipeline.wait(pair.second());
      ptx::wgmma_fence();
      begin_rows<T, D, Shape::kRows>(acc, slot(pair.first.slot), row, slot(pair.second().slot));
      ptx::wgmma_commit();
    };
    auto release = [&](const Pair& pair) {
      pipeline.release(pair.first);
      pipeline.release(pair.second());
    };
    const Pair query_key = items;
    items.next();
    begin(s, query_key);
    if constexpr (Shape::kSlots < 4) {  // the slots do not hold all four items
      ptx::wgmma_wait<0>();
      release(query_key);
    }
    begin(ds, items);
    ptx::wgmma_wait<0>();
    if constexpr (Shape::kSlots >= 4) release(query_key);
    release(items);
    items.next();

    // Gradients of scores.
    const RowStatistics<1> statistics(p, head, i0 + warp_row);
    const ScorePositions<false> positions{head, ptx::opaque(i0 + warp_row), j0};  // positions, not all their sums
    const bool unmasked = head.all_visible(i0 + row, 64, j0, Shape::kKeys), uses_dropout = p.dropout.seed != nullptr;
    DropoutMask<false, 1, NT> keep;
    if (uses_dropout) keep.generate(p.dropout, head.mask_begin, i0 + warp_row, j0);
    subtract_delta(p, ds, uses_dropout, keep, [&](int m, int, int e) { return statistics.gradient[m][e / 2]; });
    modify_scores(p, positions, unmasked, s, ds, false);
    if (!unmasked) {
      mask_out(positions, s, -infinity());
      mask_out(positions, ds, 0.0f);
    }
    recompute_probabilities(s, p.scale_log2, [&](int m, int, int e) { return statistics.softmax[m][e / 2]; });
    for_each<1, NT>([&](int m, int n, int e) { sum[m][n][e] += ds[m][n][e] * s[m][n][e]; });
  });

  // Store, through the memory of the slots.
  sync_consumers<Shape::kGroups>();
  tile.leave(slots, warp_row, sum);
  sync_consumers<Shape::kGroups>();
  tile.template store<Shape::kGroups * kWarpgroup>(slots, static_cast<int>(threadIdx.x) - kWarpgroup);
}

template <class T, int D>
void launch_bias(Backward p, Stream stream) {
  using Shape = BiasShape<D>;
  p.vectorized = reads_vectorized<T>(p);
  const dim3 grid = BiasTile<Shape::kRows, Shape::kKeys>::grid(p);
  if (grid.x == 0) return;
  launch("attention_backward", backward_bias<T, D>, grid, dim3(Shape::kThreads), Shape::kBytes, stream, p);
}

}  // namespace torchweld::cuda::attention::sm90
