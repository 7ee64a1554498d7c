// Attention forward for a few queries over many keys, as of a KV cache: what counts is that every key and value is read
// once, at the speed of the memory.
//
// attend_split   block -> a split of the keys of one key head, and 16 rows: the first query of all query heads that
//                share the key head, then the second, and so on. Each warp takes its own 16 keys of a tile, and the
//                warps' results are merged at the end.
// combine        warp -> query: merges the splits by their maxima and sums
//
// How many splits there are depends on the shape alone, and they are added in order: the same bits everywhere. A cache
// in blocks is the same with another way to find a row; each batch cuts the keys that it has into all of the splits.
// Dao et al.: Flash-Decoding, 2023.
#pragma once

#include "cuda/attention/decode.h"
#include "cuda/attention/sm80/forward.cuh"

namespace torchweld::cuda {

struct Decode : PagedAttentionParams {
  int splits, tiles;
  bool packets;
  float* partial;   // [splits, B, H, Nq, Dv] outputs of the splits, where they have seen a key
  float2* softmax;  // [splits, B, H, Nq] maximum and sum of each split
};

// Rows as in `Rows`, but in blocks: whatever the table says, they are rows of the cache.
template <class T>
struct PagedRows {
  const T* base;  // row 0 of block 0
  Strides strides;
  const int32_t* table;
  int block_size, blocks;
  int begin, end, size;
  bool packets;

  struct Walk {
    const PagedRows& of;
    int i, step;

    __device__ __forceinline__ const T* here() const {
      const int entry = static_cast<int>(static_cast<unsigned>(i) / static_cast<unsigned>(of.block_size));
      const int block = clamp(__ldg(of.table + entry), 0, of.blocks - 1);
      return of.base + block * of.strides.batch + (i - entry * of.block_size) * of.strides.row;
    }
    __device__ __forceinline__ void next() { i += step; }
  };
  __device__ __forceinline__ Walk walk(int i, int step) const { return {*this, i, step}; }
};

// Rows [begin, end) of keys or values.
template <bool kPaged, class T>
__device__ __forceinline__ auto cached_rows(const Decode& p, const Head& head, const void* base, const Strides& strides,
                                            int64_t size, int begin, int end) {
  if constexpr (kPaged)
    return PagedRows<T>{static_cast<const T*>(base) + head.kv * strides.head,
                        strides,
                        p.block_table + head.b * p.table_width,
                        static_cast<int>(p.block_size),
                        static_cast<int>(p.blocks),
                        begin,
                        end,
                        static_cast<int>(size),
                        p.packets};
  else
    return head.keys_from<T>(base, strides, size, begin, end, p.packets);
}

template <class T, int D>
struct DecodeShape {
  static constexpr int kWarps = sizeof(T) == 4 && D > 128 ? 2 : 4, kThreads = kWarps * kLanes;
  static constexpr int kKeys = kWarps * 16, kSlots = Tile<T, D>::kRowBytes <= 256 ? 3 : 2;
  static constexpr int kQueryBytes = kDecodeRows * Tile<T, D>::kRowBytes, kSlotBytes = kKeys * Tile<T, D>::kRowBytes;
  static constexpr int kBytes = kQueryBytes + kSlots * kSlotBytes;
  // What the warps leave for each other at the end: their rows of output, maxima and sums.
  static constexpr int kRowFloats = D + 4;
  static_assert(kBytes <= 99 * 1024 && kWarps * kDecodeRows * kRowFloats * 4 <= kBytes);
};

// A lane's two rows: rows g and g + 8 of the tile are queries of different heads.
struct DecodeCells {
  static constexpr bool kTransposed = false;
  Head upper, lower;
  int queries[2], column;

  __device__ __forceinline__ const Head& head(int, int e) const { return e / 2 == 0 ? upper : lower; }
  __device__ __forceinline__ int query(int, int, int e) const { return queries[e / 2]; }
  __device__ __forceinline__ int key(int, int n, int e) const { return column + 8 * n + lane_column() + e % 2; }
  __device__ __forceinline__ Head::Span span(int m, int e) const {
    const Head::Span all = head(m, e).keys_of(query(m, 0, e));
    return {all.begin - key(m, 0, 0), all.end - key(m, 0, 0)};
  }
};

template <class T, int D, bool kPaged>
__global__ void __launch_bounds__(DecodeShape<T, D>::kThreads, 2) attend_split(const __grid_constant__ Decode p) {
  using Shape = DecodeShape<T, D>;
  constexpr int kThreads = Shape::kThreads, kChunks = Tile<T, D>::kChunks;
  const int split = static_cast<int>(blockIdx.x % p.splits),
            tile_of_rows = static_cast<int>(blockIdx.x / p.splits % p.tiles);
  const unsigned shared = blockIdx.x / p.splits / p.tiles;
  const int kv_head = static_cast<int>(shared % p.kv_heads), b = static_cast<int>(shared / p.kv_heads);
  int keys = static_cast<int>(p.keys);
  if constexpr (kPaged) keys = clamp(__ldg(p.cache_seqlens + b), 0, keys);

  // Row r of the tile is a query of one of the heads; past the last one, a query that is not there.
  const int queries = static_cast<int>(p.queries), group = static_cast<int>(p.heads / p.kv_heads);
  const int row0 = tile_of_rows * kDecodeRows,
            rows = group * queries - row0 < kDecodeRows ? group * queries - row0 : kDecodeRows;
  auto query_of = [&](int row) { return (row0 + row) / group; };
  auto head_of = [&](int row) { return Head(p, b, kv_head * group + (row0 + row) % group, keys); };
  const DecodeCells own{
      head_of(lane_row()), head_of(lane_row() + 8), {query_of(lane_row()), query_of(lane_row() + 8)}, 0};

  // What the block sees of its split.
  const int split_keys = ((keys + p.splits - 1) / p.splits + kDecodeKeys - 1) / kDecodeKeys * kDecodeKeys;
  const int first = split * split_keys, beyond = first + split_keys;
  const int low = own.upper.low(query_of(0)), high = own.upper.high(query_of(rows - 1));
  const int begin = low > first ? low : first, end = high < beyond ? high : beyond;
  const int start = begin / Shape::kKeys * Shape::kKeys,
            steps = begin < end ? (end - start + Shape::kKeys - 1) / Shape::kKeys : 0;
  const auto key = cached_rows<kPaged, T>(p, own.upper, p.key, p.key_strides, p.dim, begin, end);
  const auto value = cached_rows<kPaged, T>(p, own.upper, p.value, p.value_strides, p.value_dim, begin, end);
  const uint32_t tile = ptx::shared_base();
  const Ring<T, D, Shape::kKeys, Shape::kSlots, kThreads, decltype(key)> ring{tile + Shape::kQueryBytes, key, value,
                                                                              start, steps};
  if (steps > 0)
    for (int c = static_cast<int>(threadIdx.x); c < kDecodeRows * kChunks; c += kThreads) {
      const int row = c / kChunks;
      const int column = c % kChunks * Tile<T, D>::kChunk;
      const int elements = row < rows ? clamp(static_cast<int>(p.dim) - column, 0, Tile<T, D>::kChunk) : 0;
      const T* from = head_of(row).query_rows(static_cast<const T*>(p.query), p.query_strides) +
                      query_of(row) * p.query_strides.row + column;
      load_chunk(tile + Tile<T, D>::at(row, c % kChunks), elements > 0 ? from : static_cast<const T*>(p.query),
                 elements, p.packets);
    }
  ring.fill();

  float output[1][D / 8][4] = {};
  Softmax<1> softmax;
  softmax.init();
  const bool plain = is_plain(p);
  const float unit = unit_of(p, plain);
  for (int step = 0; step < steps; ++step) {
    const int j0 = start + step * Shape::kKeys + warp() * 16;
    const uint32_t keys_offset = warp() * 16 * Tile<T, D>::kRowBytes;
    DecodeCells cells = own;
    cells.column = j0;

    // Scores. Weights.
    float s[1][2][4];
    multiply_rows<T, D>(s, tile, ring.advance(2 * step) + keys_offset);
    if (!plain) modify(p, cells, false, s);
    hide(cells, s, -infinity());
    softmax.merge(s, output, unit);

    // Values.
    multiply_columns<T, D>(output, s, ring.advance(2 * step + 1) + keys_offset, static_cast<int>(p.value_dim));
  }

  // Every warp leaves its rows.
  softmax.settle(output, unit);
  ptx::cp_async_wait<0>();
  __syncthreads();
  float* memory = reinterpret_cast<float*>(shared_memory);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* row = memory + (warp() * kDecodeRows + lane_row() + 8 * half) * Shape::kRowFloats;
#pragma unroll
    for (int n = 0; n < D / 8; ++n)
      *reinterpret_cast<float2*>(row + n * 8 + lane_column()) =
          make_float2(output[0][n][2 * half], output[0][n][2 * half + 1]);
    if (lane_column() == 0) row[D] = softmax.max[0][half], row[D + 1] = softmax.sum[0][half];
  }
  __syncthreads();

  // Merge. Store.
  for (int row = warp(); row < rows; row += Shape::kWarps) {
    const float* of = memory + row * Shape::kRowFloats;
    constexpr int kNext = kDecodeRows * Shape::kRowFloats;
    float max = -infinity(), sum = 0.0f, factor[Shape::kWarps];
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) max = fmaxf(max, of[w * kNext + D]);
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      factor[w] = ptx::exp2((of[w * kNext + D] - finite(max)) * unit);
      sum += of[w * kNext + D + 1] * factor[w];
    }
    const Head head = head_of(row);
    const int64_t index = head.values + query_of(row), place = split * p.batch * p.heads * p.queries + index;
    T* out = head.query_rows(static_cast<T*>(p.output), p.output_strides) + query_of(row) * p.output_strides.row;
    if (lane() == 0 && p.splits > 1) p.softmax[place] = make_float2(max, sum);
    if (p.splits > 1 && sum == 0.0f) continue;  // the others do without it
    const bool whole = p.splits == 1;
    const Denominator denominator(max, sum, natural_of(p, plain),
                                  whole && p.sinks != nullptr ? p.sinks + head.h : nullptr);
    for (int c = lane(); c < p.value_dim; c += kLanes) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) total += of[w * kNext + c] * factor[w];
      if (whole)
        store_one(out + c, total * denominator.inverse);
      else
        p.partial[place * p.value_dim + c] = total * denominator.inverse;
    }
    if (lane() == 0 && whole) denominator.store(p, index, max);
  }
}

template <class T>
__global__ void __launch_bounds__(kDecodeCombineWarps* kLanes) combine(const __grid_constant__ Decode p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDecodeCombineWarps + warp(),
                rows = p.batch * p.heads * p.queries;
  if (row >= rows) return;
  const int64_t i = row % p.queries, h = row / p.queries % p.heads, b = row / p.queries / p.heads;

  // The splits' shares of the whole.
  const bool plain = is_plain(p);
  const float unit = unit_of(p, plain);
  float max = -infinity(), sum = 0.0f;
  for (int s = 0; s < p.splits; ++s) max = fmaxf(max, p.softmax[s * rows + row].x);
  auto share = [&](int s) {
    const float2 split = p.softmax[s * rows + row];
    return split.y * ptx::exp2((split.x - finite(max)) * unit);
  };
  for (int s = 0; s < p.splits; ++s) sum += share(s);
  const Denominator denominator(max, sum, natural_of(p, plain), p.sinks != nullptr ? p.sinks + h : nullptr);

  T* out =
      static_cast<T*>(p.output) + b * p.output_strides.batch + h * p.output_strides.head + i * p.output_strides.row;
  for (int64_t c = lane(); c < p.value_dim; c += kLanes) {
    float total = 0.0f;
    for (int s = 0; s < p.splits; ++s)
      if (p.softmax[s * rows + row].y != 0.0f) total += p.partial[(s * rows + row) * p.value_dim + c] * share(s);
    store_one(out + c, total * denominator.inverse);
  }
  if (lane() == 0) denominator.store(p, row, max);
}

template <class T, int D, bool kPaged>
void launch_decode(const PagedAttentionParams& params, Stream stream) {
  using Shape = DecodeShape<T, D>;
  constexpr const char* kName = kPaged ? "paged_attention" : "attention_forward";
  Decode p{params};
  p.splits = static_cast<int>(decode_splits(p));
  p.tiles = static_cast<int>(decode_tiles(p));
  p.packets =
      rows_begin_on(16, sizeof(T), {p.query, p.key, p.value}, {p.query_strides, p.key_strides, p.value_strides});
  const int64_t rows = p.batch * p.heads * p.queries;
  p.softmax = reinterpret_cast<float2*>(p.workspace);
  p.partial = p.workspace + 2 * p.splits * rows;
  const dim3 blocks = grid_of(kName, p.batch * p.kv_heads * p.tiles * p.splits);
  launch(kName, attend_split<T, D, kPaged>, blocks, dim3(Shape::kThreads), Shape::kBytes, stream, p);
  if (p.splits == 1) return;
  const dim3 rest = grid_of(kName, (rows + kDecodeCombineWarps - 1) / kDecodeCombineWarps);
  launch(kName, combine<T>, rest, dim3(kDecodeCombineWarps * kLanes), 0, stream, p);
}

}  // namespace torchweld::cuda
