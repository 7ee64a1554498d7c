// The gradients of weight and bias while chunks of rows are added to them. That of the weight is as large as the
// weight, so what it is kept in counts: float32 in the output itself; bfloat16 as the upper half of a float32 in the
// output and 8 more bits beside it, 24 together, whose rounding is a 256th of the output's; float16 in a float32 of its
// own.
#pragma once

#include "cpu/simd/integers.h"

namespace torchweld::cpu {
namespace {

template <class T>
struct WeightSum;

template <>
struct WeightSum<float> {
  static constexpr int64_t bytes = 0;  // of an element, beside the output

  static void add(float* out, void*, int64_t begin, int64_t count, const float* part, bool first, bool) {
    if (first) {
      std::memcpy(out + begin, part, sizeof(float) * count);
      return;
    }
    for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      store(out + begin + i, load(out + begin + i, lanes) + load(part + i, lanes), lanes);
    });
  }
};

TW_INLINE void store_bytes(uint8_t* p, VecU v, int count) {
  typedef uint8_t Bytes __attribute__((vector_size(W)));
#if defined(__AVX512F__)
  const Bytes b = (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
  const Bytes b = __builtin_convertvector(v, Bytes);
#endif
  std::memcpy(p, &b, static_cast<size_t>(count));
}

template <>
struct WeightSum<bf16> {
  static constexpr int64_t bytes = 1;

  static void add(bf16* out, void* beside, int64_t begin, int64_t count, const float* part, bool first, bool last) {
    bf16* upper = out + begin;
    uint8_t* lower = static_cast<uint8_t*>(beside) + begin;
    for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      Vec sum = load(part + i, lanes);
      if (!first) sum = sum + from_bits(widen(load_bits(upper + i, lanes)) << 16 | load_bytes(lower + i, lanes) << 8);
      if (last) return store(upper + i, sum, lanes);
      const VecU rounded = bits(sum) + (sum == sum ? VecU{} + 0x80u : VecU{});
      store_bits(upper + i, narrow(rounded >> 16), lanes);
      store_bytes(lower + i, rounded >> 8 & 0xffu, lanes.count);
    });
  }
};

template <>
struct WeightSum<f16> {
  static constexpr int64_t bytes = 4;

  static void add(f16* out, void* beside, int64_t begin, int64_t count, const float* part, bool first, bool last) {
    float* sums = static_cast<float*>(beside) + begin;
    for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      Vec sum = load(part + i, lanes);
      if (!first) sum = sum + load(sums + i, lanes);
      if (last) return store(out + begin + i, sum, lanes);
      store(sums + i, sum, lanes);
    });
  }
};

// Adds the columns of `rows` rows of `count` dlogits, `width` apart, to the bias's gradient `total`. float32's rounding
// grows with the length of a chain of additions, so a chain is 16 rows, summed in `chain`; what the addition of a chain
// to `total` loses is exact and goes to `lost` (Knuth's TwoSum), which the last chunk of rows gives back.
template <class S>
void add_to_bias(const S* dlogits, int64_t rows, int64_t width, int64_t count, float* total, float* lost, float* chain,
                 bool first, bool last) {
  constexpr int64_t kChain = 16;
  if (first) {
    std::memset(total, 0, sizeof(float) * count);
    std::memset(lost, 0, sizeof(float) * count);
  }
  for (int64_t m0 = 0; m0 < rows; m0 += kChain) {
    std::memset(chain, 0, sizeof(float) * width);
    for (int64_t m = m0; m < min_of(m0 + kChain, rows); ++m)
      for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
        store(chain + i, load(chain + i) + load(dlogits + m * width + i, lanes));
      });
    for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec before = load(total + i, lanes), more = load(chain + i), sum = before + more, added = sum - before;
      store(lost + i, load(lost + i, lanes) + ((before - (sum - added)) + (more - added)), lanes);
      store(total + i, sum, lanes);
    });
  }
  if (last)
    for_each_vector(count, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
      const Vec rest = load(lost + i, lanes);  // NaN beside an infinite sum
      store(total + i, load(total + i, lanes) + (rest == rest ? rest : zero()), lanes);
    });
}

}  // namespace
}  // namespace torchweld::cpu
