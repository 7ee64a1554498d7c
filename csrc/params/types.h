// The types that the params of all ops share.
#pragma once

#include <cstdint>

namespace torchweld {

enum class DType : int32_t { float32, bfloat16, float16 };

// A CUDA stream; nullptr on the CPU.
using Stream = void*;

// Hands a type to a function that takes it as an argument: f(Tag<T>{}).
template <class T>
struct Tag {
  using type = T;
};

// Distances in elements. Along the last dimension it is 1.
struct Strides {
  int64_t batch, head, row;
};

}  // namespace torchweld
