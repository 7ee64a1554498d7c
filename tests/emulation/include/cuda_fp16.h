// Replaces CUDA's header of this name.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(__half value) {
  _Float16 number;
  std::memcpy(&number, &value, sizeof(number));
  return static_cast<float>(number);
}
inline __half __float2half_rn(float value) {
  const auto number = static_cast<_Float16>(value);
  __half half;
  std::memcpy(&half, &number, sizeof(half));
  return half;
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
