// The tile of dbias that a block computes, in the kernels backward_bias of both families.
#pragma once

#include "cuda/attention/backward_queries.cuh"

namespace torchweld::cuda::attention {

// At most kRows queries by kKeys keys of dbias, for batch b and head h. Along a dimension that bias is broadcast along
// there is one index, and the tile sums over that dimension.
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

  // Calls f(head, i0, j0) for each tile of scores that this tile of dbias sums, unless the band masks the whole tile.
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
            if (j0 < head.key_end(last) && j0 + kKeys > head.key_begin(i0)) f(head, i0, j0);
        }
      }
  }

  // leave() writes a warp's sum, whose first row is row0 of the tile, to shared memory. Then, after a barrier, store()
  // sums over the rows or columns that bias is broadcast along and writes dbias. `thread` is one of kThreads.
  static constexpr int kStride = kKeys + 1;  // the odd stride keeps rows in different banks
  using Sums = float[kRows][kStride];
  template <int MT, int NT>
  static __device__ __forceinline__ void leave(uint32_t memory, int row0, const float (&sum)[MT][NT][4]) {
    attention::for_each<MT, NT>([&](int m, int n, int e) {
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

}  // namespace torchweld::cuda::attention
