// The dropout mask for the elements of an accumulator. One Philox counter gives the words of four keys of a query, and
// those keys lie in different lanes: each lane computes some of the counters, and the lanes exchange words.
#pragma once

#include "cuda/attention/scores.cuh"

namespace torchweld::cuda::attention {

__device__ __forceinline__ uint32_t trade(uint32_t word, int lane_mask) {
  return __float_as_uint(__shfl_xor_sync(0xffffffffu, __uint_as_float(word), lane_mask));
}

template <bool kTransposed, int MT, int NT>
class DropoutMask {
 public:
  // mask_row: the row of query 0 in the dropout mask. The first key (row or column) is a multiple of 4.
  __device__ __forceinline__ void generate(const Dropout& dropout, int64_t mask_row, int row, int column) {
    const auto seed = static_cast<uint64_t>(*dropout.seed);
    (kTransposed ? row : column) += static_cast<int>(dropout.first_column);
#pragma unroll
    for (uint32_t& word : bits_) word = 0;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        uint32_t words[4];
        if constexpr (kTransposed)
          by_column(seed, mask_row, row + 16 * m, column + 8 * n, words);
        else
          by_row(seed, mask_row, row + 16 * m, column + 8 * n, words);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          bits_[place(m, n, e) / 32] |= (words[e] >= dropout.drop ? 1u : 0u) << place(m, n, e) % 32;
      }
  }

  __device__ __forceinline__ bool operator()(int m, int n, int e) const {
    return bits_[place(m, n, e) / 32] >> place(m, n, e) % 32 & 1;
  }

 private:
  static __device__ constexpr int place(int m, int n, int e) { return (m * NT + n) * 4 + e; }

  // Columns are keys. Two lanes share two counters: the even lane computes the upper row's, the odd lane the lower's.
  static __device__ __forceinline__ void by_row(uint64_t seed, int64_t mask_row, int row, int column,
                                                uint32_t (&words)[4]) {
    const bool odd = lane() % 2 != 0;
    const int i = row + lane_row() + (odd ? 8 : 0), block = column / 4 + lane() % 4 / 2;
    const philox::Words own = philox::words(seed, static_cast<uint64_t>(mask_row + i), static_cast<uint32_t>(block));
    const uint32_t first = trade(odd ? own.word[0] : own.word[2], 1);
    const uint32_t second = trade(odd ? own.word[1] : own.word[3], 1);
    words[0] = odd ? first : own.word[0], words[1] = odd ? second : own.word[1];
    words[2] = odd ? own.word[2] : first, words[3] = odd ? own.word[3] : second;
  }

  // Rows are keys. Four lanes share four counters per element: lane q computes the counters of element q, then the
  // lanes transpose the 4 x 4 words.
  static __device__ __forceinline__ void by_column(uint64_t seed, int64_t mask_row, int row, int column,
                                                   uint32_t (&words)[4]) {
    const int q = lane_row() % 4, block = (row + q / 2 * 8) / 4 + lane_row() / 4, i = column + lane_column() + q % 2;
    const philox::Words own = philox::words(seed, static_cast<uint64_t>(mask_row + i), static_cast<uint32_t>(block));
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = own.word[w];
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
      const bool high = (q & bit) != 0;
      const int step = bit == 1 ? 2 : 1;  // distance between the pairs that are exchanged
      uint32_t &a = words[0], &b = words[bit], &c = words[step], &d = words[3];
      const uint32_t first = trade(high ? a : b, 4 * bit), second = trade(high ? c : d, 4 * bit);
      a = high ? first : a, b = high ? b : first;
      c = high ? second : c, d = high ? d : second;
    }
  }

  uint32_t bits_[(MT * NT * 4 + 31) / 32];
};

// Zeroes the probabilities that are dropped.
template <bool kTransposed, int MT, int NT>
__device__ __forceinline__ void apply_dropout(float (&probabilities)[MT][NT][4],
                                              const DropoutMask<kTransposed, MT, NT>& keep) {
  for_each<MT, NT>(
      [&](int m, int n, int e) { probabilities[m][n][e] = keep(m, n, e) ? probabilities[m][n][e] : 0.0f; });
}

}  // namespace torchweld::cuda::attention
