// Vectors, their loads and stores, and loops over them. The loops hide tails: a body is compiled once for whole vectors
// and once for the last, partial one.
#pragma once

#include "cpu/simd/memory.h"
#include "params/types.h"

namespace torchweld::cpu {
namespace {

// body(i, lanes) for the vectors that cover [0, n).
template <class Body>
TW_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t i = 0;
  for (; i + W <= n; i += W) body(i, All{});
  if (i < n) body(i, First{static_cast<int>(n - i)});
}

// put(i, value(i, lanes), lanes) for the vectors that cover [0, n), two at once where there are two, as `beside` makes
// of their values: stored in 16 bits, they take little more time than one.
template <class Value, class Put>
TW_INLINE void for_each_value(int64_t n, Value&& value, Put&& put) {
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    const auto first = value(i, All{}), second = value(i + W, All{});
    put(i, beside(first, second), Two{});
  }
  if (i + W <= n) {
    put(i, value(i, All{}), All{});
    i += W;
  }
  if (i < n) {
    const First rest{static_cast<int>(n - i)};
    put(i, value(i, rest), rest);
  }
}

// Sum over [0, n) of term(i, lanes), a Vec or a Pair. Four chains hide the latency of the adder. They are short, and
// what they come to is added up in a chain of its own, above that in pairs: the roundings of equal terms do not cancel.
template <class Term>
TW_INLINE auto sum_over(int64_t n, Term&& term) {
  using Terms = decltype(term(n, All{}));
  constexpr int64_t kStep = 4 * W, kShort = (W > 4 ? 8 : 4) * kStep, kLong = 8 * kShort;
  Terms partial[56];  // [k]: the sum of 2^k long chains, where bit k of `chains` is set
  Terms total{};
  int64_t i = 0, chains = 0;
  while (i + kStep <= n) {
    const int64_t long_end = n - i < kLong ? n : i + kLong;
    Terms chain{};
    while (i + kStep <= long_end) {
      const int64_t end = long_end - i < kShort ? long_end : i + kShort;
      Terms s0{}, s1{}, s2{}, s3{};
      for (; i + kStep <= end; i += kStep) {
        s0 += term(i, All{});
        s1 += term(i + W, All{});
        s2 += term(i + 2 * W, All{});
        s3 += term(i + 3 * W, All{});
      }
      chain += (s0 + s1) + (s2 + s3);
    }
    if (chains == 0 && i + kStep > n) {  // one chain, the usual row, stays in registers
      total = chain;
      break;
    }
    int k = 0;
    for (; chains >> k & 1; ++k) chain += partial[k];
    partial[k] = chain;
    ++chains;
  }
  for (; i + W <= n; i += W) total += term(i, All{});
  if (i < n) {
    const First rest{static_cast<int>(n - i)};
    total += keep(term(i, rest), rest, 0.0f);
  }
  for (int k = 0; chains >> k > 0; ++k)
    if (chains >> k & 1) total += partial[k];
  return sum(total);
}

// ---- From run-time dtypes to types: f(Tag<T>{}).

template <class F>
TW_INLINE void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(Tag<float>{});
    case DType::bfloat16:
      return f(Tag<bf16>{});
    case DType::float16:
      return f(Tag<f16>{});
  }
}

}  // namespace
}  // namespace torchweld::cpu
