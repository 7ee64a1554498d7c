// The gradient of a bias: see attention/backward.cuh.
//
// Grid (tiles of keys, B * H * tiles of queries) of dbias's extents. Where bias is broadcast a block goes through all
// of that dimension, in order, and adds up dS in registers.
#pragma once

#include "cuda/attention/sm80/backward_queries.cuh"

namespace torchweld::cuda {

// What a block makes of dbias: at most kRows queries by kKeys keys, for head h of batch b, of which there is one each
// where bias is broadcast.
template <int kRows, int kKeys>
struct BiasTile {
  const Backward& p;
  int b, h, i_begin, j_begin;

  static dim3 grid(const Backward& p) {
    const int64_t* extent = p.dbias_extents;
    return grid_of("attention_backward",
                   extent[0] * extent[1] * tiles(extent[2], p.queries, kRows) * tiles(extent[3], p.keys, kKeys));
  }

  __device__ __forceinline__ BiasTile(const Backward& p, int64_t block) : p(p) {
    const int64_t* extent = p.dbias_extents;
    const int64_t key_tiles = tiles(extent[3], p.keys, kKeys), row_tiles = tiles(extent[2], p.queries, kRows);
    j_begin = static_cast<int>(block % key_tiles) * kKeys;
    i_begin = static_cast<int>(block / key_tiles % row_tiles) * kRows;
    const int64_t outer = block / key_tiles / row_tiles;
    b = static_cast<int>(outer / extent[1]), h = static_cast<int>(outer % extent[1]);
  }

  // f(head, i0, j0) for all tiles of scores that are added up in this one of dbias and are not hidden as a whole.
  template <class F>
  __device__ __forceinline__ void for_each_score(F&& f) const {
    const int64_t* extent = p.dbias_extents;
    const int queries = static_cast<int>(p.queries), keys = static_cast<int>(p.keys);
    const int i_end = extent[2] > 1 ? i_begin + 1 : queries, j_end = extent[3] > 1 ? j_begin + 1 : keys;
#pragma unroll 1
    for (int bb = b; bb < (extent[0] > 1 ? b + 1 : static_cast<int>(p.batch)); ++bb)
#pragma unroll 1
      for (int hh = h; hh < (extent[1] > 1 ? h + 1 : static_cast<int>(p.heads)); ++hh) {
        const Head head(p, bb, hh);
#pragma unroll 1
        for (int i0 = i_begin; i0 < i_end; i0 += kRows) {
          const int last = (i0 + kRows < queries ? i0 + kRows : queries) - 1;
#pragma unroll 1
          for (int j0 = j_begin; j0 < j_end; j0 += kKeys)
            if (j0 < head.high(last) && j0 + kKeys > head.low(i0)) f(head, i0, j0);
        }
      }
  }

  // A sum of this warp's, whose first row is row0 of the tile, to shared memory; then, once all are there, from there
  // to dbias, over its rows or columns where bias is broadcast. Thread `thread` of kThreads.
  static constexpr int kStride = kKeys + 1, kBytes = kRows * kStride * static_cast<int>(sizeof(float));
  template <int MT, int NT>
  static __device__ __forceinline__ void leave(uint32_t memory, int row0, const float (&sum)[MT][NT][4]) {
    torchweld::cuda::for_each<MT, NT>([&](int m, int n, int e) {
      const int row = row0 + 16 * m + lane_row() + e / 2 * 8, column = 8 * n + lane_column() + e % 2;
      ptx::store_shared(memory + (row * kStride + column) * 4, __float_as_uint(sum[m][n][e]));
    });
  }
  template <int kThreads>
  __device__ __forceinline__ void store(uint32_t memory, int thread) const {
    const int64_t* extent = p.dbias_extents;
    auto least = [](int a, int b) { return a < b ? a : b; };
    const bool by_row = extent[2] > 1, by_key = extent[3] > 1;
    const int rows_here = by_row ? least(kRows, static_cast<int>(p.queries) - i_begin) : 1;
    const int keys_here = by_key ? least(kKeys, static_cast<int>(p.keys) - j_begin) : 1;
    const int rows_summed = by_row ? 1 : kRows, keys_summed = by_key ? 1 : kKeys;
    for (int c = thread; c < rows_here * keys_here; c += kThreads) {
      const int row = c / keys_here, column = c % keys_here;
      float total = 0.0f;
      for (int r = row; r < row + rows_summed; ++r)
        for (int k = column; k < column + keys_summed; ++k)
          total += __uint_as_float(ptx::load_shared(memory + (r * kStride + k) * 4));
      const int64_t outer = static_cast<int64_t>(b) * extent[1] + h;
      const int64_t place = (outer * extent[2] + i_begin + row) * extent[3] + j_begin + column;
      auto store = [&](auto tag) {
        using B = typename decltype(tag)::type;
        store_one(static_cast<B*>(p.dbias) + place, total);
      };
      if (p.bias_type == MaskType::float32)
        store(Tag<float>{});
      else if (p.bias_type == MaskType::bfloat16)
        store(Tag<__nv_bfloat16>{});
      else
        store(Tag<__half>{});
    }
  }

 private:
  static TW_HOST_DEVICE int64_t tiles(int64_t extent, int64_t rows, int tile) {
    return extent > 1 ? (rows + tile - 1) / tile : 1;
  }
};

template <class T, int D>
__global__ void __launch_bounds__(BackwardShape<T, D, false>::kThreads, 2)
    differentiate_bias(const __grid_constant__ Backward p) {
  if (kOnHopper<T, D>) return;
  using Shape = BackwardShape<T, D, false>;
  constexpr int MT = Shape::MT, NT = Shape::kOthers / 8, kThreads = Shape::kThreads;
  using Tile = BiasTile<Shape::kRows, Shape::kOthers>;
  static_assert(Tile::kBytes <= Shape::kBytes);
  const Tile tile(p, blockIdx.x);
  float sum[MT][NT][4] = {};
  const BackwardMemory<T, D, false> memory;
  tile.for_each_score([&](const Head& head, int i0, int j0) {
    const SeenKeys<1> seen(head, i0, Shape::kRows);
    const BackwardRows<T> rows(p, head, seen.begin, seen.end);
    const int row0 = i0 + warp() * MT * 16;
    const RowValues<MT> values(p, head, row0);
    __syncthreads();
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[0], rows.query, i0);
    load_tile<T, D, Shape::kRows, kThreads>(memory.own[1], rows.doutput, i0);
    load_tile<T, D, Shape::kOthers, kThreads>(memory.others(0, 0), rows.key, j0);
    load_tile<T, D, Shape::kOthers, kThreads>(memory.others(0, 1), rows.value, j0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    float ds[MT][NT][4];
    score_gradient<T, D, false>(p, head, values, memory, 0, i0, row0, j0, false, ds);
    for_each<MT, NT>([&](int m, int n, int e) { sum[m][n][e] += ds[m][n][e]; });
  });
  __syncthreads();
  Tile::leave(memory.own[0], warp() * MT * 16, sum);
  __syncthreads();
  tile.template store<kThreads>(memory.own[0], static_cast<int>(threadIdx.x));
}

template <class T, int D>
void launch_bias(Backward p, Stream stream) {
  using Shape = BackwardShape<T, D, false>;
  p.packets = reads_packets<T>(p);
  const dim3 grid = BiasTile<Shape::kRows, Shape::kOthers>::grid(p);
  if (grid.x == 0) return;
  launch("attention_backward", differentiate_bias<T, D>, grid, dim3(Shape::kThreads), Shape::kBytes, stream, p);
}

}  // namespace torchweld::cuda
