// Attention, forward; cpu/attention/forward.cpp has the formula.
//
// Block -> a tile of queries of one head, 16 or 32 per warp. The block loops over the tiles of keys that its queries
// see, with the online softmax (Milakov, Gimelshein, arXiv:1805.02867). Scores and output stay in registers, and the
// probabilities of a tile are the left operand of the next product. Only tiles on the edge of the mask's band are
// masked. 2 Nq Nk (D + Dv) FLOPs per head. Every block reads the keys and values that it sees, mostly from L2 (see
// Schedule). Dao: FlashAttention-2, arXiv:2307.08691.
#pragma once

#include "cuda/attention/forward.cuh"
#include "cuda/attention/sm80/products.cuh"
#include "cuda/attention/sm80/ring.cuh"

namespace torchweld::cuda::attention::sm80 {

// A block fits the 99 KB of shared memory of sm_86 and sm_89.
template <class T, int D, bool kPlain>
struct ForwardShape {
  static constexpr bool kFloat32 = sizeof(T) == 4;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int MT = kPlain && !kFloat32 && D <= 128 ? 2 : 1;
  static constexpr int kQueries = kWarps * MT * 16;
  static constexpr int kKeys = kFloat32   ? (D <= 64    ? 64
                                             : D <= 128 ? 32
                                                        : 16)
                               : D <= 64  ? 64
                               : D <= 128 ? (kPlain ? 48 : 64)
                                          : 32;
  static constexpr int kSlots = D <= 128 ? 3 : kFloat32 ? 2 : 4;
  using KeyRing = Ring<T, D, kKeys, kSlots, kThreads, Rows<T>>;

  struct Memory {
    uint8_t queries[kQueries * Tile<T, D>::kRowBytes];
    typename KeyRing::Slots slots;
  };
  static constexpr int kBytes = static_cast<int>(sizeof(Memory));
  static_assert(kBytes <= 99 * 1024);
};

template <class T, int D, bool kPlain>
__global__ void __launch_bounds__(ForwardShape<T, D, kPlain>::kThreads, 2) forward(const __grid_constant__ Forward p) {
  if (kReplacedOnHopper<T, D>) return;
  using Shape = ForwardShape<T, D, kPlain>;
  using Memory = typename Shape::Memory;
  constexpr int MT = Shape::MT, NT = Shape::kKeys / 8, kThreads = Shape::kThreads;
  const Schedule::Work work = p.schedule.work(blockIdx.x);
  const Head head(p, static_cast<int>(work.head / p.heads), static_cast<int>(work.head % p.heads));
  const int i0 = work.tile * Shape::kQueries, row0 = i0 + warp() * MT * 16;
  if (i0 >= head.queries) return;

  const VisibleKeys<Shape::kKeys> visible(head, i0, Shape::kQueries);
  const Rows<T> key = head.keys_from<T>(p.key, p.key_strides, p.dim, visible.begin, visible.end, p.vectorized);
  const Rows<T> value =
      head.keys_from<T>(p.value, p.value_strides, p.value_dim, visible.begin, visible.end, p.vectorized);
  const uint32_t queries = ptx::shared_base();
  const typename Shape::KeyRing ring{queries + static_cast<uint32_t>(offsetof(Memory, slots)), key, value,
                                     visible.start, visible.steps};
  if (visible.steps > 0)
    load_tile<T, D, Shape::kQueries, kThreads>(queries,
                                               head.all_queries<T>(p.query, p.query_strides, p.dim, p.vectorized), i0);
  ring.fill();

  float output[MT][D / 8][4] = {};
  Softmax<MT> softmax;
  softmax.init();
  const float scale_log2 = scale_log2_of(p, kPlain);
  const bool uses_dropout = !kPlain && p.dropout.seed != nullptr;
  for (int step = 0; step < visible.steps; ++step) {
    const int j0 = visible.start + step * Shape::kKeys;

    // Scores.
    float s[MT][NT][4];
    const uint32_t keys = ring.advance(2 * step);
    multiply_rows<T, D>(s, queries + warp() * MT * 16 * Tile<T, D>::kRowBytes, keys);
    const ScorePositions<false> positions{head, row0, j0};
    const bool unmasked = head.all_visible(i0, Shape::kQueries, j0, Shape::kKeys);
    if constexpr (!kPlain) modify_scores(p, positions, unmasked, s);
    if (!unmasked) mask_out(positions, s, -infinity());

    // Softmax.
    softmax.merge(s, output, scale_log2);
    if (uses_dropout) {
      DropoutMask<false, MT, NT> keep;
      keep.generate(p.dropout, head.mask_begin, row0, j0);
      apply_dropout(s, keep);
    }

    // Values.
    multiply_columns<T, D>(output, s, ring.advance(2 * step + 1), static_cast<int>(p.value_dim));
  }

  // Normalise. Store.
  const float dropout_scale = uses_dropout ? p.dropout.scale : 1.0f;
  softmax.finish(output, scale_log2);
  T* out = head.query_rows(static_cast<T*>(p.output), p.output_strides);
  auto row_of = [&](int m, int half) { return row0 + m * 16 + lane_row() + half * 8; };
  auto denominator = [&](int m, int half) {
    return Denominator(softmax.max[m][half], softmax.sum[m][half], score_scale_of(p, kPlain),
                       p.sinks != nullptr ? p.sinks + head.h : nullptr);
  };
  store_rows<T>(
      output, static_cast<int>(p.value_dim), p.pairs,
      [&](int m, int half) {
        return row_of(m, half) < head.queries ? out + row_of(m, half) * p.output_strides.row : nullptr;
      },
      [&](int m, int half) { return denominator(m, half).inverse * dropout_scale; });
  if (lane_column() != 0) return;
#pragma unroll
  for (int r = 0; r < 2 * MT; ++r)
    if (row_of(r / 2, r % 2) < head.queries)
      denominator(r / 2, r % 2).store(p, head.statistics_begin + row_of(r / 2, r % 2), softmax.max[r / 2][r % 2]);
}

template <class T, int D, bool kPlain>
void launch_forward(const AttentionForwardParams& params, Stream stream) {
  using Shape = ForwardShape<T, D, kPlain>;
  attention::launch_forward<T>(params, Shape::kQueries, forward<T, D, kPlain>, Shape::kThreads, Shape::kBytes, stream);
}

}  // namespace torchweld::cuda::attention::sm80
