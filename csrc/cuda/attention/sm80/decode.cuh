// Attention, forward, for few queries over many keys, as with a KV cache. The limit is memory: every key and value is
// read once.
//
// decode_split    block -> one split of the keys of one key head, and 16 rows: query 0 of all query heads that share
// the
//                 key head, then query 1, and so on. A warp takes 16 keys of each tile; at the end the block merges the
//                 results of its warps.
// decode_combine  warp -> query: merges the splits by their maxima and sums
//
// The number of splits depends on the shape alone, and splits are added in order: the same bits on every run. A paged
// cache differs in how a row is found, and each batch splits the keys that it has. Dao et al.: Flash-Decoding, 2023.
#pragma once

#include "cuda/attention/decode.h"
#include "cuda/attention/sm80/forward.cuh"

namespace torchweld::cuda::attention::sm80 {

struct Decode : PagedAttentionParams {
  int splits, tiles;
  bool vectorized;
  float* partial;            // [splits, B, H, Nq, Dv] output of each split, where it sees a key
  float2* split_statistics;  // [splits, B, H, Nq] (max, sum) of each split
};

// Rows of a paged cache. Whatever the block table says, they are rows of the cache.
template <class T>
struct PagedRows {
  const T* base;  // row 0 of block 0
  Strides strides;
  const int32_t* table;
  int block_size, blocks;
  int begin, end, size;
  bool vectorized;

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
                        p.vectorized};
  else
    return head.keys_from<T>(base, strides, size, begin, end, p.vectorized);
}

template <class T, int D>
struct DecodeShape {
  static constexpr int kWarps = sizeof(T) == 4 && D > 128 ? 2 : 4, kThreads = kWarps * kWarpSize;
  static constexpr int kKeys = kWarps * 16, kSlots = Tile<T, D>::kRowBytes <= 256 ? 3 : 2;

  struct Memory {
    uint8_t queries[kDecodeRows * Tile<T, D>::kRowBytes];
    uint8_t slots[kSlots][kKeys * Tile<T, D>::kRowBytes];
  };
  // After the loop the same memory holds each warp's result for each row: the output, then maximum and sum.
  static constexpr int kMax = D, kSum = D + 1, kRowFloats = D + 4;
  using Results = float[kWarps][kDecodeRows][kRowFloats];
  static constexpr int kBytes = static_cast<int>(sizeof(Memory));
  static_assert(kBytes <= 99 * 1024 && sizeof(Results) <= sizeof(Memory));
};

// The positions of a lane's two rows: rows g and g + 8 of the tile belong to different heads.
struct DecodePositions {
  static constexpr bool kTransposed = false;
  Head upper, lower;
  int queries[2], column;

  __device__ __forceinline__ const Head& head(int, int e) const { return e / 2 == 0 ? upper : lower; }
  __device__ __forceinline__ int query(int, int, int e) const { return queries[e / 2]; }
  __device__ __forceinline__ int key(int, int n, int e) const { return column + 8 * n + lane_column() + e % 2; }
  __device__ __forceinline__ Head::Span span(int m, int e) const {
    const Head::Span all = head(m, e).visible_keys(query(m, 0, e));
    return {all.begin - key(m, 0, 0), all.end - key(m, 0, 0)};
  }
};

template <class T, int D, bool kPaged>
__global__ void __launch_bounds__(DecodeShape<T, D>::kThreads, 2) decode_split(const __grid_constant__ Decode p) {
  using Shape = DecodeShape<T, D>;
  using Memory = typename Shape::Memory;
  constexpr int kThreads = Shape::kThreads, kChunks = Tile<T, D>::kChunks;
  const int split = static_cast<int>(blockIdx.x % p.splits),
            tile_of_rows = static_cast<int>(blockIdx.x / p.splits % p.tiles);
  const unsigned shared = blockIdx.x / p.splits / p.tiles;
  const int kv_head = static_cast<int>(shared % p.kv_heads), b = static_cast<int>(shared / p.kv_heads);
  int keys = static_cast<int>(p.keys);
  if constexpr (kPaged) keys = clamp(__ldg(p.cache_seqlens + b), 0, keys);

  // Row r of the tile is a query of one of the heads. Past the last query of the tile, the query does not exist.
  const int queries = static_cast<int>(p.queries), group = static_cast<int>(p.heads / p.kv_heads);
  const int row0 = tile_of_rows * kDecodeRows,
            rows = group * queries - row0 < kDecodeRows ? group * queries - row0 : kDecodeRows;
  auto query_of = [&](int row) { return (row0 + row) / group; };
  auto head_of = [&](int row) { return Head(p, b, kv_head * group + (row0 + row) % group, keys); };
  const DecodePositions own{
      head_of(lane_row()), head_of(lane_row() + 8), {query_of(lane_row()), query_of(lane_row() + 8)}, 0};

  // The keys of the split that the block sees.
  const int split_keys = ((keys + p.splits - 1) / p.splits + kDecodeKeys - 1) / kDecodeKeys * kDecodeKeys;
  const int first = split * split_keys, beyond = first + split_keys;
  const int low = own.upper.key_begin(query_of(0)), high = own.upper.key_end(query_of(rows - 1));
  const int begin = low > first ? low : first, end = high < beyond ? high : beyond;
  const int start = begin / Shape::kKeys * Shape::kKeys,
            steps = begin < end ? (end - start + Shape::kKeys - 1) / Shape::kKeys : 0;
  const auto key = cached_rows<kPaged, T>(p, own.upper, p.key, p.key_strides, p.dim, begin, end);
  const auto value = cached_rows<kPaged, T>(p, own.upper, p.value, p.value_strides, p.value_dim, begin, end);
  const uint32_t tile = ptx::shared_base();
  const Ring<T, D, Shape::kKeys, Shape::kSlots, kThreads, decltype(key)> ring{
      tile + static_cast<uint32_t>(offsetof(Memory, slots)), key, value, start, steps};
  if (steps > 0)
    for (int c = static_cast<int>(threadIdx.x); c < kDecodeRows * kChunks; c += kThreads) {
      const int row = c / kChunks;
      const int column = c % kChunks * Tile<T, D>::kChunk;
      const int elements = row < rows ? clamp(static_cast<int>(p.dim) - column, 0, Tile<T, D>::kChunk) : 0;
      const T* from = head_of(row).query_rows(static_cast<const T*>(p.query), p.query_strides) +
                      query_of(row) * p.query_strides.row + column;
      load_chunk(tile + Tile<T, D>::at(row, c % kChunks), elements > 0 ? from : static_cast<const T*>(p.query),
                 elements, p.vectorized);
    }
  ring.fill();

  float output[1][D / 8][4] = {};
  Softmax<1> softmax;
  softmax.init();
  const bool plain = is_plain(p);
  const float scale_log2 = scale_log2_of(p, plain);
  for (int step = 0; step < steps; ++step) {
    const int j0 = start + step * Shape::kKeys + warp() * 16;
    const uint32_t keys_offset = warp() * 16 * Tile<T, D>::kRowBytes;
    DecodePositions positions = own;
    positions.column = j0;

    // Scores. Softmax.
    float s[1][2][4];
    multiply_rows<T, D>(s, tile, ring.advance(2 * step) + keys_offset);
    if (!plain) modify_scores(p, positions, false, s);
    mask_out(positions, s, -infinity());
    softmax.merge(s, output, scale_log2);

    // Values.
    multiply_columns<T, D>(output, s, ring.advance(2 * step + 1) + keys_offset, static_cast<int>(p.value_dim));
  }

  // Each warp writes its results.
  softmax.finish(output, scale_log2);
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
    if (lane_column() == 0) row[Shape::kMax] = softmax.max[0][half], row[Shape::kSum] = softmax.sum[0][half];
  }
  __syncthreads();

  // Merge. Store.
  for (int row = warp(); row < rows; row += Shape::kWarps) {
    const float* result = memory + row * Shape::kRowFloats;
    constexpr int kWarpFloats = kDecodeRows * Shape::kRowFloats;
    float max = -infinity(), sum = 0.0f, factor[Shape::kWarps];
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) max = fmaxf(max, result[w * kWarpFloats + Shape::kMax]);
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      factor[w] = ptx::exp2((result[w * kWarpFloats + Shape::kMax] - finite_or_zero(max)) * scale_log2);
      sum += result[w * kWarpFloats + Shape::kSum] * factor[w];
    }
    const Head head = head_of(row);
    const int64_t index = head.statistics_begin + query_of(row), place = split * p.batch * p.heads * p.queries + index;
    T* out = head.query_rows(static_cast<T*>(p.output), p.output_strides) + query_of(row) * p.output_strides.row;
    if (lane() == 0 && p.splits > 1) p.split_statistics[place] = make_float2(max, sum);
    if (p.splits > 1 && sum == 0.0f) continue;  // decode_combine skips this split
    const bool single_split = p.splits == 1;
    const Denominator denominator(max, sum, score_scale_of(p, plain),
                                  single_split && p.sinks != nullptr ? p.sinks + head.h : nullptr);
    for (int c = lane(); c < p.value_dim; c += kWarpSize) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) total += result[w * kWarpFloats + c] * factor[w];
      if (single_split)
        store_one(out + c, total * denominator.inverse);
      else
        p.partial[place * p.value_dim + c] = total * denominator.inverse;
    }
    if (lane() == 0 && single_split) denominator.store(p, index, max);
  }
}

template <class T>
__global__ void __launch_bounds__(kDecodeCombineWarps* kWarpSize) decode_combine(const __grid_constant__ Decode p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDecodeCombineWarps + warp(),
                rows = p.batch * p.heads * p.queries;
  if (row >= rows) return;
  const int64_t i = row % p.queries, h = row / p.queries % p.heads, b = row / p.queries / p.heads;

  // The weight of each split.
  const bool plain = is_plain(p);
  const float scale_log2 = scale_log2_of(p, plain);
  float max = -infinity(), sum = 0.0f;
  for (int s = 0; s < p.splits; ++s) max = fmaxf(max, p.split_statistics[s * rows + row].x);
  auto share = [&](int s) {
    const float2 split = p.split_statistics[s * rows + row];
    return split.y * ptx::exp2((split.x - finite_or_zero(max)) * scale_log2);
  };
  for (int s = 0; s < p.splits; ++s) sum += share(s);
  const Denominator denominator(max, sum, score_scale_of(p, plain), p.sinks != nullptr ? p.sinks + h : nullptr);

  T* out =
      static_cast<T*>(p.output) + b * p.output_strides.batch + h * p.output_strides.head + i * p.output_strides.row;
  for (int64_t c = lane(); c < p.value_dim; c += kWarpSize) {
    float total = 0.0f;
    for (int s = 0; s < p.splits; ++s)
      if (p.split_statistics[s * rows + row].y != 0.0f)
        total += p.partial[(s * rows + row) * p.value_dim + c] * share(s);
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
  p.vectorized =
      rows_aligned(16, sizeof(T), {p.query, p.key, p.value}, {p.query_strides, p.key_strides, p.value_strides});
  const int64_t rows = p.batch * p.heads * p.queries;
  p.split_statistics = reinterpret_cast<float2*>(p.workspace);
  p.partial = p.workspace + 2 * p.splits * rows;
  const dim3 blocks = grid_of(kName, p.batch * p.kv_heads * p.tiles * p.splits);
  launch(kName, decode_split<T, D, kPaged>, blocks, dim3(Shape::kThreads), Shape::kBytes, stream, p);
  if (p.splits == 1) return;
  const dim3 rest = grid_of(kName, (rows + kDecodeCombineWarps - 1) / kDecodeCombineWarps);
  launch(kName, decode_combine<T>, rest, dim3(kDecodeCombineWarps * kWarpSize), 0, stream, p);
}

}  // namespace torchweld::cuda::attention::sm80
