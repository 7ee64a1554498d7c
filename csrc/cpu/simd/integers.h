// Integers: the smaller and the larger, quotients rounded up, multiples. The standard library's algorithms are not
// used, for their symbols are weak.
#pragma once

#include "cpu/simd/vec.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
TW_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
TW_INLINE int64_t round_down(int64_t a, int64_t b) { return a / b * b; }

}  // namespace
}  // namespace torchweld::cpu
