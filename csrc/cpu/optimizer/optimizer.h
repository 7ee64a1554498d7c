// The parts that the steps of all optimizers share. A list of tensors is one range of work: a thread owns one stretch
// of the concatenation. Every element is computed by itself, so the bits do not depend on the division among threads.
// An optimizer adds a rule, which maps a vector of parameters and gradients to the new parameters.
#pragma once

#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd/integers.h"
#include "cpu/simd/random.h"
#include "cpu/simd/vec.h"
#include "params/optimizer.h"

namespace torchweld::cpu {
namespace {

// A shorter list runs on one thread: beside other programs a parallel region may wait for milliseconds, longer than the
// work takes.
constexpr int64_t kElementsAlone = 1 << 18;

// The least number of a list's `units` that a thread takes.
inline int64_t grain(int64_t elements, int64_t units) {
  return (elements < kElementsAlone ? units : units * kElementsPerThread / elements) + 1;
}

template <class T>
T* at(void* base, int64_t index) {
  return static_cast<T*>(base) + index;
}

// Prefetches the lines 2 KB ahead of two vectors of a stream. The step has up to ten streams, in pages of 4 KB, which
// is more than the core's own prefetchers follow.
template <class T>
TW_INLINE void prefetch(const T* p) {
  constexpr size_t kAhead = 2048, kLine = 64, kBytes = 2 * W * sizeof(T);
  for (size_t at = 0; at < kBytes; at += kLine) __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + at);
}

// f(i, begin, end) for the elements of each tensor i that lie in chunks [first, last) of the concatenation.
template <class F>
TW_INLINE void for_each_stretch(const OptimizerTensor* tensors, int64_t count, int64_t first, int64_t last, F&& f) {
  const int64_t begin = first * kOptimizerChunkCpu, end = last * kOptimizerChunkCpu;
  int64_t i = 0;
  for (int64_t above = count; above - i > 1;) {
    const int64_t middle = (i + above) / 2;
    (tensors[middle].begin <= begin ? i : above) = middle;
  }
  for (; i < count && tensors[i].begin < end; ++i) {
    const OptimizerTensor& t = tensors[i];
    const int64_t from = begin > t.begin ? begin - t.begin : 0, to = min_of(end - t.begin, t.numel);
    if (from < to) f(i, from, to);
  }
}

// ---- Rounding at random

// 16 random bits for each element of a tensor, in the low halves of the lanes.
class RandomHalves {
 public:
  TW_INLINE RandomHalves(uint64_t seed, uint64_t row) : seed_(seed), row_(row) {}

  // For elements [i, i + W); i is a multiple of W.
  TW_INLINE VecU at(int64_t i) {
    const int64_t batch = i / (8 * W);
    if (batch != batch_) philox_words(seed_, row_, batch_ = batch, words_);
    return widen(load_bits(reinterpret_cast<const char*>(words_) + i % (8 * W) * 2, All{}));
  }

 private:
  const uint64_t seed_, row_;
  int64_t batch_ = -1;
  alignas(64) uint32_t words_[4 * W];
};

// Random bits 0 round towards zero, 0xffff away from zero. Infinities and NaNs stay: the NaNs of arithmetic have the
// highest bit of their mantissa set.
TW_INLINE VecH narrow_bf16_at_random(Vec v, VecU random) {
  const VecU added = (bits(v) & 0x7f800000u) != VecU{} + 0x7f800000u ? random : VecU{};
  return narrow((bits(v) + added) >> 16);
}

template <class Lanes>
TW_INLINE void store_at_random(bf16* p, Vec v, RandomHalves& random, int64_t i, Lanes lanes) {
  store_bits(p, narrow_bf16_at_random(v, random.at(i)), lanes);
}
TW_INLINE void store_at_random(bf16* p, Pair v, RandomHalves& random, int64_t i, Two) {
  store_at_random(p, v.first, random, i, All{});
  store_at_random(p + W, v.second, random, i + W, All{});
}

// ---- Masters

TW_INLINE VecH rounding_of(Vec master, const bf16*) { return narrow_bf16(master); }
TW_INLINE VecH rounding_of(Vec master, const f16*) { return narrow_f16(master); }

TW_INLINE bool equal(VecH a, VecH b) {
#if defined(__AVX512F__)
  return _mm256_cmpneq_epi16_mask((__m256i)a, (__m256i)b) == 0;
#else
  const VecH difference = a ^ b;
  uint64_t words[sizeof difference / 8], any = 0;
  std::memcpy(words, &difference, sizeof words);
  for (const uint64_t word : words) any |= word;
  return any == 0;
#endif
}

// The values that a step starts from: the master, or the parameter where it is not a rounding of the master, because
// other code has written to it. A step that rounds at random leaves one of the master's two neighbours.
template <class T, class Lanes>
TW_INLINE Vec newest(const float* master, const T* param, bool stochastic, Lanes lanes) {
  const Vec m = load(master, lanes);
  const VecH found = load_bits(param, lanes);
  if (stochastic) {
    const VecU down = widen(narrow_bf16_at_random(m, VecU{})), up = widen(narrow_bf16_at_random(m, VecU{} + 0xffffu));
    return widen(found) == down ? m : widen(found) == up ? m : load(param, lanes);
  }
  const VecH rounded = rounding_of(m, param);
  if (__builtin_expect(equal(found, rounded), 1)) return m;
  return widen(found) == widen(rounded) ? m : load(param, lanes);
}

template <class Lanes>
TW_INLINE Vec newest(const float*, const float* param, bool, Lanes lanes) {
  return load(param, lanes);  // the master of a float32 parameter is a copy
}

// ---- Step

// The factors that all tensors of a call share.
struct Call {
  float unscale, clip;  // clip has the sign of `maximize`
  bool write_grad, zero_grads, stochastic;
  uint64_t seed;
};

inline Call call_of(const OptimizerParams& p) {
  double clip = 1;
  if (p.grad_norm != nullptr) {
    const double ratio = p.max_grad_norm / (*p.grad_norm + 1e-6);
    clip = ratio >= 1 ? 1 : ratio;  // NaN stays NaN, as in clip_grad_norm_
  }
  return {p.grad_scale != nullptr ? 1.0f / *p.grad_scale : 1.0f,
          static_cast<float>(p.maximize ? -clip : clip),
          p.grad_scale != nullptr || p.zero_grads,
          p.zero_grads,
          p.stochastic,
          p.rounding_seed};
}

inline double learning_rate(const OptimizerParams& p) { return p.lr_tensor != nullptr ? *p.lr_tensor : p.lr; }

// T: parameter, GT: gradient, ST: state.
template <class T, class GT, class ST, class Rule>
void update(const OptimizerTensor t, int64_t index, const Call call, const Rule rule, int64_t begin, int64_t end) {
  T* param = at<T>(t.param, begin);
  GT* grad = at<GT>(t.grad, begin);
  float* master = t.master != nullptr ? t.master + begin : nullptr;
  RandomHalves random(call.seed,
                      (t.step != nullptr ? static_cast<uint64_t>(*t.step) << 32 : 0) | static_cast<uint64_t>(index));

  auto updated = [&](int64_t i, auto lanes) __attribute__((always_inline)) {
    const Vec p = master != nullptr ? newest(master + i, param + i, call.stochastic, lanes) : load(param + i, lanes);
    Vec g = load(grad + i, lanes);
    if (call.write_grad) {
      g = g * call.unscale;
      store(grad + i, call.zero_grads ? zero() : g, lanes);
    }
    return rule.template operator()<ST>(t, p, g * call.clip, begin + i, lanes);
  };
  auto run = [&](auto&& store_param) __attribute__((always_inline)) {
    auto put = [&](int64_t i, auto p, auto lanes) __attribute__((always_inline)) {
      master != nullptr ? prefetch(master + i) : prefetch(param + i);
      prefetch(grad + i);
      rule.template fetch<ST>(t, begin + i);
      if (master != nullptr) store(master + i, p, lanes);
      store_param(i, p, lanes);
    };
    if constexpr (sizeof(T) == 2) {
      for_each_value(end - begin, updated, put);
    } else {
      for_each_vector(end - begin,
                      [&](int64_t i, auto lanes) __attribute__((always_inline)) { put(i, updated(i, lanes), lanes); });
    }
  };
  if constexpr (std::is_same_v<T, bf16>)
    if (call.stochastic)
      return run([&](int64_t i, auto p, auto lanes)
                     __attribute__((always_inline)) { store_at_random(param + i, p, random, begin + i, lanes); });
  run([&](int64_t i, auto p, auto lanes) __attribute__((always_inline)) { store(param + i, p, lanes); });
}

// One step of the whole list.
template <class Rule>
void step(const OptimizerParams& p, const Rule& rule) {
  const Call call = call_of(p);
  const int64_t chunks = p.total / kOptimizerChunkCpu;
  parallel_for(chunks, grain(p.total, chunks), [&](int64_t first, int64_t last) {
    for_each_stretch(p.tensors, p.count, first, last, [&](int64_t index, int64_t begin, int64_t end) {
      const OptimizerTensor& t = p.tensors[index];
      dispatch(t.dtype, [&](auto own) {
        auto of = [&](DType dtype, auto&& f) { dtype == t.dtype ? f(own) : f(Tag<float>{}); };
        of(t.grad_dtype, [&](auto grad) {
          of(t.state_dtype, [&](auto state) {
            using T = typename decltype(own)::type;
            update<T, typename decltype(grad)::type, typename decltype(state)::type>(t, index, call, rule, begin, end);
          });
        });
      });
    });
  });
}

// Whether found_inf is set: the step then changes nothing, but zero_grads still sets the gradients to zero.
inline bool overflowed(const OptimizerParams& p) {
  if (p.found_inf == nullptr || *p.found_inf == 0) return false;
  if (p.zero_grads) {
    const int64_t chunks = p.total / kOptimizerChunkCpu;
    parallel_for(chunks, grain(p.total, chunks), [&](int64_t first, int64_t last) {
      for_each_stretch(p.tensors, p.count, first, last, [&](int64_t index, int64_t begin, int64_t end) {
        const OptimizerTensor& t = p.tensors[index];
        const int64_t bytes = t.grad_dtype == DType::float32 ? 4 : 2;
        std::memset(at<char>(t.grad, begin * bytes), 0, (end - begin) * bytes);
      });
    });
  }
  return true;
}

}  // namespace
}  // namespace torchweld::cpu
