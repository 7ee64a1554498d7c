// Dropout: output = input * factor, the factor of (row, column) 0 or 1 / (1 - p) (philox.h). The backward is the same,
// of the gradient. A unit of work is a part of a row. One value read and one written; the random bits take most of the
// time.

#include "cpu/simd/dropout.h"

#include "cpu/isa/kernels.h"
#include "cpu/parallel.h"
#include "cpu/simd/vec.h"

namespace torchweld::cpu {
namespace {

constexpr int64_t kColumns = 4096;           // of a part: whole batches of random words
constexpr int64_t kElementsOfThread = 8192;  // with fewer a second thread costs more than it gains

// Columns [begin, end) of a row.
template <class T>
TW_INLINE void drop_part(const DropoutParams& p, int64_t m, int64_t begin, int64_t end) {
  const T* input = static_cast<const T*>(p.input) + m * p.cols + begin;
  T* output = static_cast<T*>(p.output) + m * p.cols + begin;
  MaskRow mask(p.dropout, static_cast<uint64_t>(m));
  for_each_value(
      end - begin,
      [&](int64_t i, auto lanes)
          __attribute__((always_inline)) { return load(input + i, lanes) * mask.factors(begin + i); },
      [&](int64_t i, auto y, auto lanes) __attribute__((always_inline)) { store(output + i, y, lanes); });
}

}  // namespace

namespace TORCHWELD_VECTOR_ISA {

void dropout(const DropoutParams& p) {
  if (p.rows == 0 || p.cols == 0) return;
  const int64_t parts = (p.cols + kColumns - 1) / kColumns, width = p.cols < kColumns ? p.cols : kColumns;
  dispatch(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    parallel_for(p.rows * parts, (kElementsOfThread + width - 1) / width, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t begin = unit % parts * kColumns, end = begin + kColumns;
        drop_part<T>(p, unit / parts, begin, end < p.cols ? end : p.cols);
      }
    });
  });
}

}  // namespace TORCHWELD_VECTOR_ISA
}  // namespace torchweld::cpu
