// Loads and stores, of all lanes or the first ones: loads convert from float, bf16 or fp16; stores round to nearest
// even.
#pragma once

#include "cpu/simd/halves.h"

namespace torchweld::cpu {
namespace {

TW_INLINE VecH load_bits(const void* p, All) {
  VecH h;
  std::memcpy(&h, p, sizeof h);
  return h;
}

TW_INLINE VecH load_bits(const void* p, First lanes) {
#if defined(__AVX512F__)
  return (VecH)_mm256_maskz_loadu_epi16(mask_of(lanes), p);
#else
  VecH h{};
  std::memcpy(&h, p, 2 * lanes.count);
  return h;
#endif
}

TW_INLINE void store_bits(void* p, VecH h, All) { std::memcpy(p, &h, sizeof h); }

TW_INLINE void store_bits(void* p, VecH h, First lanes) {
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, mask_of(lanes), (__m256i)h);
#else
  std::memcpy(p, &h, 2 * lanes.count);
#endif
}

// Bytes, a lane each.
TW_INLINE VecU load_bytes(const uint8_t* p, All) {
  typedef uint8_t Bytes __attribute__((vector_size(W)));
  Bytes b;
  std::memcpy(&b, p, sizeof b);
#if defined(__AVX512F__)
  return (VecU)_mm512_cvtepu8_epi32((__m128i)b);
#elif defined(__AVX2__)
  return (VecU)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)b));
#else
  return __builtin_convertvector(b, VecU);
#endif
}

TW_INLINE VecU load_bytes(const uint8_t* p, First lanes) {
  uint8_t b[W] = {};
  std::memcpy(b, p, static_cast<size_t>(lanes.count));
  return load_bytes(b, All{});
}

TW_INLINE Vec load(const float* p, All) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

TW_INLINE Vec load(const float* p, First lanes) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_loadu_ps(mask_of(lanes), p);
#elif defined(__AVX2__)
  return (Vec)_mm256_maskload_ps(p, mask_of(lanes));
#else
  Vec v{};
  std::memcpy(&v, p, 4 * lanes.count);
  return v;
#endif
}

TW_INLINE void store(float* p, Vec v, All) { std::memcpy(p, &v, sizeof v); }

TW_INLINE void store(float* p, Vec v, First lanes) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, mask_of(lanes), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, mask_of(lanes), (__m256)v);
#else
  std::memcpy(p, &v, 4 * lanes.count);
#endif
}

// Stores, and returns the value that a load would return.
template <class Lanes>
TW_INLINE Vec store_rounded(float* p, Vec v, Lanes lanes) {
  return store(p, v, lanes), v;
}
template <class Lanes>
TW_INLINE Vec store_rounded(bf16* p, Vec v, Lanes lanes) {
  const VecH h = narrow_bf16(v);
  return store_bits(p, h, lanes), widen_bf16(h);
}
template <class Lanes>
TW_INLINE Vec store_rounded(f16* p, Vec v, Lanes lanes) {
  const VecH h = narrow_f16(v);
  return store_bits(p, h, lanes), widen_f16(h);
}

// Stores past the caches, for outputs too large to stay there: no line is read before it is overwritten. p is aligned
// to the vector.
TW_INLINE void stream_bits(void* p, VecH h) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)h);
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)h);
#else
  store_bits(p, h, All{});
#endif
}

TW_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v, All{});
#endif
}

template <class Lanes>
TW_INLINE Vec load(const bf16* p, Lanes lanes) {
  return widen_bf16(load_bits(p, lanes));
}
template <class Lanes>
TW_INLINE Vec load(const f16* p, Lanes lanes) {
  return widen_f16(load_bits(p, lanes));
}
template <class Lanes>
TW_INLINE void store(bf16* p, Vec v, Lanes lanes) {
  store_bits(p, narrow_bf16(v), lanes);
}
template <class Lanes>
TW_INLINE void store(f16* p, Vec v, Lanes lanes) {
  store_bits(p, narrow_f16(v), lanes);
}

TW_INLINE void stream(bf16* p, Vec v) { stream_bits(p, narrow_bf16(v)); }
TW_INLINE void stream(f16* p, Vec v) { stream_bits(p, narrow_f16(v)); }

// Stores of two neighbouring vectors.
template <class T>
TW_INLINE void store(T* p, Pair v, Two) {
  store(p, v.first, All{});
  store(p + W, v.second, All{});
}
template <class T>
TW_INLINE void stream(T* p, Pair v) {
  stream(p, v.first);
  stream(p + W, v.second);
}
#if defined(__SSE2__)
TW_INLINE void store(bf16* p, Pair v, Two) {
  const VecHH h = narrow_bf16(v);
  std::memcpy(p, &h, sizeof h);
}
TW_INLINE void stream(bf16* p, Pair v) {
  VecH halves[2];
  const VecHH h = narrow_bf16(v);
  std::memcpy(halves, &h, sizeof h);
  stream_bits(p, halves[0]);
  stream_bits(p + W, halves[1]);
}
#endif

// Whether an output [M, N] is stored past the caches: it is too large to stay there, and its rows are aligned.
template <class T>
bool past_cache(const void* output, int64_t rows, int64_t cols) {
  constexpr int64_t kCacheBytes = 8 << 20;
  const int64_t row_bytes = cols * sizeof(T);
  return rows * row_bytes >= kCacheBytes && row_bytes % (W * sizeof(T)) == 0 &&
         reinterpret_cast<uintptr_t>(output) % (W * sizeof(T)) == 0;
}

// Stores an output, past the caches if `past_cache`: every row then begins at a vector's alignment.
template <class T>
TW_INLINE void store_output(T* p, Vec v, All, bool past_cache) {
  past_cache ? stream(p, v) : store(p, v, All{});
}
template <class T>
TW_INLINE void store_output(T* p, Pair v, Two lanes, bool past_cache) {
  past_cache ? stream(p, v) : store(p, v, lanes);
}
template <class T>
TW_INLINE void store_output(T* p, Vec v, First lanes, bool) {
  store(p, v, lanes);
}

template <class T>
TW_INLINE Vec load(const T* p) {
  return load(p, All{});
}
template <class T>
TW_INLINE void store(T* p, Vec v) {
  store(p, v, All{});
}

}  // namespace
}  // namespace torchweld::cpu
