// Rotary embeddings of query and key, forward and (inverse) backward:
//
//   output = (x cos - z sin, z cos + x sin)      inverse: dinput = (dx cos + dz sin, dz cos - dx sin)
//
// for the pairs (x, z) of a head, halves of it or neighbours. The tables may have another cosine and sine for x than
// for z; then the inverse, which is the transpose, takes those of the element that it comes from.
//
// A thread owns whole tokens, in blocks whose rows of the tables stay in the first-level cache for all heads; within a
// block it goes along what lies beside each other in memory. One value read and one written. Su, Lu, Pan, Murtadha,
// Wen, Liu: RoFormer, arXiv:2104.09864.

#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kBlock = 32;           // tokens
constexpr int64_t kPerThread = 1 << 14;  // elements that are worth a thread

struct Turned {
  Vec x, z;
};
struct PairOfTurned {
  Pair x, z;
};
TW_INLINE PairOfTurned beside(Turned a, Turned b) { return {{a.x, b.x}, {a.z, b.z}}; }

// The first R elements of a head whose pairs are its halves. `second`: where the tables have the columns of z.
template <bool kInverse, class T, class C>
TW_INLINE void turn_halves(const T* input, T* output, const C* cos, const C* sin, int64_t half, int64_t second) {
  for_each_value(
      half,
      [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const Vec x = load(input + i, lanes), z = load(input + half + i, lanes);
        const Vec cos_x = load(cos + i, lanes), cos_z = load(cos + second + i, lanes);
        const Vec sin_x = load(sin + i, lanes), sin_z = load(sin + second + i, lanes);
        if constexpr (kInverse)
          return Turned{x * cos_x + z * sin_z, z * cos_z - x * sin_x};
        else
          return Turned{x * cos_x - z * sin_x, z * cos_z + x * sin_z};
      },
      [&](int64_t i, auto v, auto lanes) __attribute__((always_inline)) {
        store(output + i, v.x, lanes);
        store(output + half + i, v.z, lanes);
      });
}

TW_INLINE Vec neighbours_swapped(Vec v) {
  VecI index;
  for (int i = 0; i < W; ++i) index[i] = i ^ 1;
  return shuffle(v, index);
}

TW_INLINE Vec even_lanes_negated(Vec v) {
  VecU sign;
  for (int i = 0; i < W; ++i) sign[i] = i % 2 == 0 ? 0x80000000u : 0;
  return from_bits(bits(v) ^ sign);
}

// The same of a head whose pairs are neighbours: R is even, so a vector has both of a pair.
template <bool kInverse, class T, class C>
TW_INLINE void turn_neighbours(const T* input, T* output, const C* cos, const C* sin, int64_t count) {
  for_each_value(
      count,
      [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        const Vec x = load(input + i, lanes), s = even_lanes_negated(load(sin + i, lanes));
        const Vec crossed = kInverse ? neighbours_swapped(x * s) : neighbours_swapped(x) * s;
        return x * load(cos + i, lanes) + crossed;
      },
      [&](int64_t i, auto v, auto lanes) __attribute__((always_inline)) { store(output + i, v, lanes); });
}

// The tokens [first, last) of batch b, of one tensor.
template <bool kInverse, class T, class C>
void turn_block(const RotaryParams& p, const RotaryTensor& t, int64_t b, int64_t first, int64_t last) {
  const int64_t R = p.rotary_dim, half = R / 2, tail = p.dim - R;
  auto turn = [&](int64_t h, int64_t n) __attribute__((always_inline)) {
    const Strides &from = t.input_strides, &to = t.output_strides;
    const T* input = static_cast<const T*>(t.input) + b * from.batch + h * from.head + n * from.row;
    T* output = static_cast<T*>(t.output) + b * to.batch + h * to.head + n * to.row;
    const int64_t position = p.position_ids ? p.position_ids[b * p.position_batch_stride + n] : n;
    const C* cos = static_cast<const C*>(p.cos) + b * p.cos_batch_stride + position * p.table_cols;
    const C* sin = static_cast<const C*>(p.sin) + b * p.sin_batch_stride + position * p.table_cols;
    if (p.interleaved)
      turn_neighbours<kInverse>(input, output, cos, sin, R);
    else
      turn_halves<kInverse>(input, output, cos, sin, half, p.table_cols - half);
    if (tail > 0 && input != output) std::memcpy(output + R, input + R, static_cast<size_t>(tail) * sizeof(T));
  };
  if (t.output_strides.head < t.output_strides.row) {
    for (int64_t n = first; n < last; ++n)
      for (int64_t h = 0; h < t.heads; ++h) turn(h, n);
  } else {
    for (int64_t h = 0; h < t.heads; ++h)
      for (int64_t n = first; n < last; ++n) turn(h, n);
  }
}

template <bool kInverse, class T, class C>
void turn_all(const RotaryParams& p) {
  const int64_t elements = (p.query.heads + p.key.heads) * p.dim;  // of a token
  const int64_t grain = elements > 0 ? (kPerThread + elements - 1) / elements : 1;
  parallel_for(p.batch * p.tokens, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / p.tokens, first = begin % p.tokens;
      int64_t count = p.tokens - first < kBlock ? p.tokens - first : kBlock;
      if (count > end - begin) count = end - begin;
      turn_block<kInverse, T, C>(p, p.query, b, first, first + count);
      turn_block<kInverse, T, C>(p, p.key, b, first, first + count);
      begin += count;
    }
  });
}

template <class T, class C>
void turn_either_way(const RotaryParams& p) {
  p.inverse ? turn_all<true, T, C>(p) : turn_all<false, T, C>(p);
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void rotary_embedding(const RotaryParams& p) {
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    p.table_dtype == p.dtype ? turn_either_way<T, T>(p) : turn_either_way<T, float>(p);
  });
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
