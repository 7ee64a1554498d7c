// The gradient of a bias on Hopper: sm80/backward_bias.cuh with the products of wgmma, and the tiles of the next
// scores on their way meanwhile.
#pragma once

#include "cuda/attention/sm80/backward_bias.cuh"
#include "cuda/attention/sm90/ring.cuh"

namespace torchweld::cuda {

// Items 4n to 4n + 3: queries, keys, doutput and values of tile n of scores.
template <int D>
struct BiasShapeSm90 {
  static constexpr int kGroups = 2, kThreads = (1 + kGroups) * kWarpgroup, kRows = 128, kKeys = 128;
  static constexpr int kSlots = D <= 64 ? 8 : D <= 128 ? 6 : 3;
  static constexpr int kRegisters = 240, kLoaderRegisters = 24;
  using Item = Panels<D, 128>;
  using Ring = Slots<kSlots, kGroups * 4>;
  static constexpr int kBytes = AlignedMemory::kBytes + kSlots * Item::kBytes + Ring::kBarrierBytes;
  static_assert(kBytes <= 227 * 1024 && BiasTile<kRows, kKeys>::kBytes <= kSlots * Item::kBytes);
};

template <class T, int D>
__global__ void __launch_bounds__(BiasShapeSm90<D>::kThreads, 1)
    differentiate_bias_sm90(const __grid_constant__ Backward p) {
  using Shape = BiasShapeSm90<D>;
  constexpr int NT = Shape::kKeys / 8;
  const BiasTile<Shape::kRows, Shape::kKeys> tile(p, blockIdx.x);
  const uint32_t slots = AlignedMemory::begin();
  const typename Shape::Ring ring{slots + Shape::kSlots * Shape::Item::kBytes};
  auto slot = [&](int item) { return slots + static_cast<uint32_t>(item % Shape::kSlots * Shape::Item::kBytes); };
  ring.init();

  if (warpgroup() == 0) {
    ptx::registers_decrease<Shape::kLoaderRegisters>();
    typename Shape::Ring::Filling filling{ring};
    tile.for_each_score([&](const Head& head, int i0, int j0) {
      const SeenKeys<1> seen(head, i0, Shape::kRows);
      const BackwardRows<T> all(p, head, seen.begin, seen.end);
#pragma unroll 1
      for (int which = 0; which < 4; ++which)
        filling.add([&](int item) {
          const Rows<T> queries = which < 2 ? Rows<T>(all.query) : Rows<T>(all.doutput);
          const Rows<T> keys = which < 2 ? Rows<T>(all.key) : Rows<T>(all.value);
          const Rows<T> rows = which % 2 == 0 ? Rows<T>(queries) : Rows<T>(keys);
          load_tile<T, D, 128, kWarpgroup, typename Shape::Item>(slot(item), rows, which % 2 == 0 ? i0 : j0);
        });
    });
    filling.end();
    return;
  }
  ptx::registers_increase<Shape::kRegisters>();
  const int row = (warpgroup() - 1) * 64, warp_row = row + warp() % 4 * 16;
  float sum[1][NT][4] = {};
  int item = 0;
  tile.for_each_score([&](const Head& head, int i0, int j0) {
    // Products.
    float s[1][NT][4], ds[1][NT][4];
    auto begin = [&](float (&acc)[1][NT][4], int left) {
      ring.await(left);
      ring.await(left + 1);
      ptx::wgmma_fence();
      begin_rows<T, D, Shape::kRows>(acc, slot(left), row, slot(left + 1));
      ptx::wgmma_commit();
    };
    auto release = [&](int left) {
      ring.release(left);
      ring.release(left + 1);
    };
    begin(s, item);
    if constexpr (Shape::kSlots < 4) {  // there is no room for all
      ptx::wgmma_wait<0>();
      release(item);
    }
    begin(ds, item + 2);
    ptx::wgmma_wait<0>();
    if constexpr (Shape::kSlots >= 4) release(item);
    release(item + 2);
    item += 4;

    // Gradients of scores.
    const RowValues<1> values(p, head, i0 + warp_row);
    const Cells<false> cells{head, i0 + warp_row, j0};
    const bool whole = head.sees_all(i0 + row, 64, j0, Shape::kKeys), drops = p.dropout.seed != nullptr;
    Kept<false, 1, NT> kept;
    if (drops) kept.draw(p.dropout, head.values, i0 + warp_row, j0);
    subtract_delta(p, ds, drops, kept, [&](int m, int, int e) { return values.gradient[m][e / 2]; });
    modify(p, cells, whole, s, ds, false);
    if (!whole) {
      hide(cells, s, -infinity());
      hide(cells, ds, 0.0f);
    }
    weigh(s, p.unit, [&](int m, int, int e) { return values.softmax[m][e / 2]; });
    for_each<1, NT>([&](int m, int n, int e) { sum[m][n][e] += ds[m][n][e] * s[m][n][e]; });
  });

  // Store, from where the last tiles have been.
  constexpr int kStoring = Shape::kGroups * kWarpgroup;
  ptx::barrier_sync(1, kStoring);
  tile.leave(slots, warp_row, sum);
  ptx::barrier_sync(1, kStoring);
  tile.template store<kStoring>(slots, static_cast<int>(threadIdx.x) - kWarpgroup);
}

template <class T, int D>
void launch_bias_sm90(Backward p, Stream stream) {
  using Shape = BiasShapeSm90<D>;
  p.packets = reads_packets<T>(p);
  const dim3 grid = BiasTile<Shape::kRows, Shape::kKeys>::grid(p);
  if (grid.x == 0) return;
  launch("attention_backward", differentiate_bias_sm90<T, D>, grid, dim3(Shape::kThreads), Shape::kBytes, stream, p);
}

}  // namespace torchweld::cuda
