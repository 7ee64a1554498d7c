// Pack and product of csrc/cpu/matmul alone, in every format of an instruction set. Everything that is written to is
// NaN before, and what is not wanted must be so after.
#include <cmath>
#include <vector>

#include "cpu/matmul/pack.h"

using namespace torchweld;
using namespace torchweld::cpu;

namespace {

constexpr int64_t kRowsOfC = 6 * 32;  // a multiple of every format's block_rows
constexpr float kNothing = __builtin_nanf("");

struct Memory : std::vector<float> {
  explicit Memory(int64_t words) : std::vector<float>(words + 32, kNothing) {}
  // Aligned as torch's memory is: an operand of tiles must not be split over cache lines, but may be.
  float* data() { return std::vector<float>::data(); }
};

// C[m, n] = sum over k of a[m, k] * b[n, k], in the columns of each block of rows that `columns` names.
template <class T, class Compute>
void scores(const T* a, const T* b, int64_t rows, int64_t columns, int64_t dim, int64_t first, float* c, int64_t ldc) {
  const TileScope scope;
  const int64_t steps = words_of<Compute>(dim);
  Memory left(round_up(rows, 32) * steps),
      right(round_up(columns, Compute::column_unit) * steps + Compute::panel * steps);
  Left l{left.data(), steps, 1};
  if (left_in_place<T, Compute>(dim, dim))
    l = {reinterpret_cast<const float*>(a), dim / Compute::per_word, 1};
  else
    pack_left<T, Compute>(a, dim, rows, dim, left.data());
  pack_transposed<T, Compute>(b, dim, columns, dim, right.data());
  std::vector<Span> wanted(ceil_div(rows, Compute::block_rows));
  // Of every second block of rows only the columns from `first` on.
  for (size_t n = 0; n < wanted.size(); ++n)
    wanted[n] = {n % 2 ? round_down(first, Compute::column_unit) : 0, round_up(columns, Compute::column_unit)};
  gemm_store<Compute>(rows, steps, l, {right.data(), Compute::panel, Compute::panel * steps}, wanted.data(), c, ldc);
}

// C[m, n] += sum over k of a[m, k] * b[k, n], for every second block of rows from element `first` of k on.
template <class T, class Compute>
void accumulate(const T* a, const T* b, int64_t rows, int64_t columns, int64_t dim, int64_t first, float* c,
                int64_t ldc, bool transposed) {
  const TileScope scope;
  const int64_t steps = words_of<Compute>(dim), width = round_up(columns, W);
  Memory left(round_up(rows, 32) * steps), right(round_up(width, 32) * steps);
  Left l{left.data(), steps, 1};
  if constexpr (Compute::tiles) {
    if (transposed)
      pack_columns<T, Compute>(a, rows, dim, rows, left.data(), steps);
    else
      pack_left<T, Compute>(a, dim, rows, dim, left.data());
  } else {
    // The vector units read a left operand with any two strides.
    if (left_in_place<T, Compute>(dim, dim) && !transposed)
      l = {reinterpret_cast<const float*>(a), dim / Compute::per_word, 1};
    else if (transposed)
      pack_rows<T, Compute>(a, rows, dim, rows, left.data(), 0), l = {left.data(), 1, round_up(rows, W)};
    else
      pack_left<T, Compute>(a, dim, rows, dim, left.data());
  }
  Right r{right.data(), Compute::tiles ? Compute::panel : width, Compute::tiles ? Compute::panel * steps : kPanel};
  if (right_in_place<T, Compute>(columns))
    r = {reinterpret_cast<const float*>(b), columns, kPanel};
  else
    pack_rows<T, Compute>(b, columns, dim, columns, right.data(), r.panel);
  std::vector<Span> wanted(ceil_div(rows, Compute::block_rows));
  for (size_t n = 0; n < wanted.size(); ++n) wanted[n] = steps_between<Compute>(n % 2 ? first : 0, dim);
  gemm_accumulate<Compute>(rows, width, l, r, wanted.data(), c, ldc);
}

template <class T, class Compute>
void product(int kind, const void* a, const void* b, const long* sizes, float* c, long ldc) {
  const T *left = static_cast<const T*>(a), *right = static_cast<const T*>(b);
  const int64_t rows = sizes[0], columns = sizes[1], dim = sizes[2], first = sizes[3];
  if (kind == 0) return scores<T, Compute>(left, right, rows, columns, dim, first, c, ldc);
  accumulate<T, Compute>(left, right, rows, columns, dim, first, c, ldc, kind == 2);
}

// Whether every word of an operand of tiles has a place of its own, in whole blocks.
template <int kParts>
bool layout_is_a_bijection() {
  using Layout = TileLayout<kParts>;
  const int64_t rows = 48, words = 80, row = words * kParts;
  std::vector<int> left(rows * row), right(rows * row);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < words; ++k)
      for (int part = 0; part < kParts; ++part) {
        ++left[Layout::left(m, k, row) + part * Layout::block];
        ++right[Layout::right(k, m, Layout::side * row) + part * Layout::block];
        if (Layout::element(2 * k + 1) != 2 * Layout::left(0, k, row) + 1) return false;
        if (Layout::at_step(k / 16 * 16 * kParts) != Layout::block_of(k)) return false;
      }
  for (int64_t n = 0; n < rows * row; ++n)
    if (left[n] != 1 || right[n] != 1) return false;
  return true;
}

}  // namespace

// block_rows, column_unit, elements of a unit of steps, and parts of each format.
#define FORMAT(name, T, Compute)                                                                        \
  extern "C" void name(int kind, const void* a, const void* b, const long* sizes, float* c, long ldc) { \
    product<T, Compute>(kind, a, b, sizes, c, ldc);                                                     \
  }                                                                                                     \
  extern "C" void name##_units(long* out) {                                                             \
    out[0] = Compute::block_rows, out[1] = Compute::column_unit;                                        \
    out[2] = Compute::step_unit * Compute::per_word, out[3] = Compute::parts, out[4] = W;               \
  }
FORMAT(float32, float, ComputeOf<float>::type)
FORMAT(bfloat16, bf16, ComputeOf<bf16>::type)
FORMAT(float16, f16, ComputeOf<f16>::type)
FORMAT(vector_float32, float, VectorComputeOf<float>::type)
FORMAT(vector_bfloat16, bf16, VectorComputeOf<bf16>::type)
FORMAT(vector_float16, f16, VectorComputeOf<f16>::type)

extern "C" bool layouts() {
  return layout_is_a_bijection<1>() && layout_is_a_bijection<2>() && layout_is_a_bijection<3>();
}
static_assert(kRowsOfC % 32 == 0 && kRowsOfC % kRows == 0);
