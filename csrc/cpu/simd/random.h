// Philox on vectors (philox.h): the words of neighbouring columns of a row, in their order.
#pragma once

#include "cpu/simd/vec.h"
#include "philox.h"

namespace torchweld::cpu {
namespace {

typedef uint64_t VecL __attribute__((vector_size(4 * W)));  // W / 2 numbers of 64 bits

// 64-bit products of the low halves of the lanes. The high halves do not matter.
TW_INLINE VecL multiply_low(VecL a, uint32_t b) {
#if defined(__AVX512F__)
  return (VecL)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));  // GCC 12 warns of the plain one
#elif defined(__AVX2__)
  return (VecL)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

// Writes words 4 * W * batch to 4 * W * (batch + 1) of the row. A lane makes one block of four. Two sets of lanes hide
// the latency of the products.
TW_INLINE void philox_words(uint64_t seed, uint64_t row, int64_t batch, uint32_t* words) {
  constexpr int kLanes = W / 2;
  VecL c0[2], c1[2], c2[2], c3[2] = {}, lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = static_cast<uint64_t>(l);
  for (int k = 0; k < 2; ++k) {
    c0[k] = lane + static_cast<uint64_t>(batch * W + k * kLanes);
    c1[k] = VecL{} + static_cast<uint32_t>(row);
    c2[k] = VecL{} + (row >> 32);
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < philox::kRounds; ++round, key0 += philox::kWeyl0, key1 += philox::kWeyl1) {
    for (int k = 0; k < 2; ++k) {
      const VecL product0 = multiply_low(c0[k], philox::kMultiplier0),
                 product1 = multiply_low(c2[k], philox::kMultiplier1);
      c0[k] = (product1 >> 32) ^ c1[k] ^ static_cast<uint64_t>(key0);
      c1[k] = product1;
      c2[k] = (product0 >> 32) ^ c3[k] ^ static_cast<uint64_t>(key1);
      c3[k] = product0;
    }
  }
  // Words 0 and 1 of a block are one number, and so are 2 and 3. Interleaved, they have the order of the columns.
  const VecL low = (lane >> 1) + (lane & 1) * kLanes, high = low + kLanes / 2;
  for (int k = 0; k < 2; ++k) {
    const VecL first = (c0[k] & 0xffffffffu) | (c1[k] << 32), second = (c2[k] & 0xffffffffu) | (c3[k] << 32);
    const VecL in_order[2] = {shuffle(first, second, low), shuffle(first, second, high)};
    std::memcpy(words + 2 * W * k, in_order, sizeof in_order);
  }
}

}  // namespace
}  // namespace torchweld::cpu
