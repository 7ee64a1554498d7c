// Rotary embeddings of query and key, forward and (inverse) backward:
//
//   output = (x cos - z sin, z cos + x sin)      inverse: dinput = (dx cos + dz sin, dz cos - dx sin)
//
// for the pairs (x, z) of a head, halves of it or neighbours. The tables may have another cosine and sine for x than
// for z; then the inverse, which is the transpose, takes those of the element that it comes from. Su, Lu, Pan,
// Murtadha, Wen, Liu: RoFormer, arXiv:2104.09864.
//
// Grid -> (batches, groups of blockDim.y tokens, groups of heads), the last the fastest. A thread owns the same two
// vectors of 16 bytes in every head of its group, one in each half of the elements that are turned: whatever the layout
// of the pairs, both of a pair are in them, and their cosines and sines are loaded once. Heads are loaded kHeads at a
// time before any of them is turned. Where a vector would not begin on 16 bytes, a thread has a pair. One value read
// and one written.

#include <algorithm>

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"

namespace torchweld::cuda::rotary {
namespace {

constexpr int kThreads = 128, kHeads = 4;
constexpr int64_t kBlocksPerProcessor = 8;  // as many as these, before a thread gets more heads than kHeads

struct Turn : RotaryParams {
  int64_t token_blocks, query_groups, groups, heads;  // heads: of a group
  int64_t pairs, items;  // items of a head: `pairs` that are turned, then vectors that are copied
};

// What a thread turns by: the columns of its two vectors.
template <class C, int V>
struct Angles {
  Vector<C, V> cos_x, cos_z, sin_x, sin_z;
};

// The halves of a head are pairs, or single neighbours are.
template <bool kInverse, class T, class C, int V>
__device__ __forceinline__ void turn_halves(Vector<T, V>& x, Vector<T, V>& z, const Angles<C, V>& by) {
  const Vector<T, V> from = x;
  x.set([&](int i) {
    return kInverse ? from[i] * by.cos_x[i] + z[i] * by.sin_z[i] : from[i] * by.cos_x[i] - z[i] * by.sin_x[i];
  });
  const Vector<T, V> other = z;
  z.set([&](int i) {
    return kInverse ? other[i] * by.cos_z[i] - from[i] * by.sin_x[i] : other[i] * by.cos_z[i] + from[i] * by.sin_z[i];
  });
}

// Neighbours in a vector are pairs.
template <bool kInverse, class T, class C, int V>
__device__ __forceinline__ void turn_neighbours(Vector<T, V>& x, const Vector<C, V>& cos, const Vector<C, V>& sin) {
  const Vector<T, V> from = x;
  x.set([&](int i) {
    const int other = i ^ 1;
    const float crossed = from[other] * sin[kInverse ? other : i];
    return (i % 2 == 0) != kInverse ? from[i] * cos[i] - crossed : from[i] * cos[i] + crossed;
  });
}

// The heads [first, last) of one token of one tensor.
template <class T>
struct Heads {
  const T* input;
  T* output;
  int64_t first, last, input_stride, output_stride;
};

// Turns vectors x and z, which begin at these elements, of every head.
template <bool kInterleaved, bool kInverse, class T, class C, int V>
__device__ __forceinline__ void turn_heads(const Heads<T>& heads, int64_t at_x, int64_t at_z, const Angles<C, V>& by) {
#pragma unroll 1
  for (int64_t h = heads.first; h < heads.last; h += kHeads) {
    // Load.
    Vector<T, V> x[kHeads], z[kHeads];
#pragma unroll
    for (int c = 0; c < kHeads; ++c) {
      if (h + c >= heads.last) break;
      const T* head = heads.input + (h + c) * heads.input_stride;
      x[c].load_once(head + at_x);
      z[c].load_once(head + at_z);
    }

    // Turn, store.
#pragma unroll
    for (int c = 0; c < kHeads; ++c) {
      if (h + c >= heads.last) break;
      if constexpr (kInterleaved && V > 1) {
        turn_neighbours<kInverse>(x[c], by.cos_x, by.sin_x);
        turn_neighbours<kInverse>(z[c], by.cos_z, by.sin_z);
      } else {
        turn_halves<kInverse>(x[c], z[c], by);
      }
      T* head = heads.output + (h + c) * heads.output_stride;
      x[c].store(head + at_x);
      z[c].store(head + at_z);
    }
  }
}

template <class T, class C, bool kInterleaved, int V>
__global__ void __launch_bounds__(kThreads) turn(const __grid_constant__ Turn p) {
  const auto groups = static_cast<unsigned>(p.groups), token_blocks = static_cast<unsigned>(p.token_blocks);
  const unsigned group = blockIdx.x % groups, block = blockIdx.x / groups;
  const int64_t b = block / token_blocks, n = int64_t{block % token_blocks} * blockDim.y + threadIdx.y;
  if (n >= p.tokens) return;
  const bool of_query = group < p.query_groups;
  const RotaryTensor t = of_query ? p.query : p.key;
  const int64_t first = (of_query ? group : group - p.query_groups) * p.heads;
  const Heads<T> heads{at<T>(t.input, b * t.input_strides.batch + n * t.input_strides.row),
                       at<T>(t.output, b * t.output_strides.batch + n * t.output_strides.row),
                       first,
                       first + p.heads < t.heads ? first + p.heads : t.heads,
                       t.input_strides.head,
                       t.output_strides.head};

  const int64_t position = p.position_ids != nullptr ? p.position_ids[b * p.position_batch_stride + n] : n;
  if (position < 0 || position >= p.table_rows)
    ptx::refuse("0 <= position && position < rows of cos", "rotary_embedding");
  const C* cos = at<C>(p.cos, b * p.cos_batch_stride + position * p.table_cols);
  const C* sin = at<C>(p.sin, b * p.sin_batch_stride + position * p.table_cols);
  for (int64_t i = threadIdx.x; i < p.items; i += blockDim.x) {
    if (i < p.pairs) {
      constexpr bool kNeighbours = kInterleaved && V == 1;
      const int64_t half = p.rotary_dim / 2;
      const int64_t at_x = kNeighbours ? 2 * i : i * V, at_z = kNeighbours ? 2 * i + 1 : half + i * V;
      const int64_t column_z = p.table_cols == half ? at_x : at_z;  // one for a pair, or for each of both
      Angles<C, V> by;
      by.cos_x.load(cos + at_x);
      by.sin_x.load(sin + at_x);
      by.cos_z.load(cos + column_z);
      by.sin_z.load(sin + column_z);
      if (p.inverse)
        turn_heads<kInterleaved, true>(heads, at_x, at_z, by);
      else
        turn_heads<kInterleaved, false>(heads, at_x, at_z, by);
    } else if (heads.input != heads.output) {
      const int64_t rest = p.rotary_dim + (i - p.pairs) * V;
#pragma unroll 1
      for (int64_t h = heads.first; h < heads.last; ++h) {
        Vector<T, V> x;
        x.load_once(heads.input + h * heads.input_stride + rest);
        x.store(heads.output + h * heads.output_stride + rest);
      }
    }
  }
}

bool vectors_of(const RotaryParams& p, const RotaryTensor& t, int width) {
  const auto whole = [&](const Strides& strides) {
    return (p.batch == 1 || strides.batch % width == 0) && (t.heads == 1 || strides.head % width == 0) &&
           (p.tokens == 1 || strides.row % width == 0);
  };
  return t.heads == 0 || (aligned16(t.input, t.output) && whole(t.input_strides) && whole(t.output_strides));
}

// A thread gets as many heads as leave every multiprocessor enough blocks: then the tables are read the least.
Turn divided(const RotaryParams& params, int width, dim3* block) {
  Turn p{params};
  p.pairs = p.rotary_dim / 2 / width;
  p.items = p.pairs + (p.dim - p.rotary_dim) / width;
  const int lanes = std::min(lanes_for(p.items, 1), kThreads);
  *block = dim3(static_cast<unsigned>(lanes), static_cast<unsigned>(std::min<int64_t>(kThreads / lanes, p.tokens)));
  p.token_blocks = (p.tokens + block->y - 1) / block->y;
  const int64_t enough = kBlocksPerProcessor * multiprocessors(current_device());
  for (p.heads = kHeads;; p.heads *= 2) {
    p.query_groups = (p.query.heads + p.heads - 1) / p.heads;
    p.groups = p.query_groups + (p.key.heads + p.heads - 1) / p.heads;
    const bool all = p.heads >= std::max(p.query.heads, p.key.heads);
    if (all || p.batch * p.token_blocks * (p.groups / 2) < enough) return p;
  }
}

template <class T, class C>
void launch_turn(const RotaryParams& params, Stream stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vectorized = params.rotary_dim / 2 % V == 0 && params.dim % V == 0 && aligned16(params.cos, params.sin) &&
                          vectors_of(params, params.query, V) && vectors_of(params, params.key, V);
  dim3 block;
  const Turn p = divided(params, vectorized ? V : 1, &block);
  const dim3 grid = grid_of("rotary_embedding", p.batch * p.token_blocks * p.groups);
  const auto kernel = params.interleaved ? (vectorized ? turn<T, C, true, V> : turn<T, C, true, 1>)
                                         : (vectorized ? turn<T, C, false, V> : turn<T, C, false, 1>);
  launch("rotary_embedding", kernel, grid, block, 0, stream, p);
}

}  // namespace
}  // namespace torchweld::cuda::rotary

namespace torchweld::cuda {

void rotary_embedding(const RotaryParams& p, Stream stream) {
  if (p.batch == 0 || p.tokens == 0 || p.query.heads + p.key.heads == 0) return;
  dispatch_types("rotary_embedding", p.dtype, p.table_dtype, [&](auto t, auto c) {
    rotary::launch_turn<typename decltype(t)::type, typename decltype(c)::type>(p, stream);
  });
}

}  // namespace torchweld::cuda
