// wgmma's "Matrix Descriptor Format" and "Canonical Layouts".
#pragma once

#include <cstdint>

namespace emulation {

struct Descriptor {
  uint32_t start, leading, stride;
  int swizzle;  // bytes, 0: none

  explicit Descriptor(uint64_t bits);
  // Fails if the swizzle's atoms, of 8 rows, do not begin on a multiple of their size: the address of a chunk decides
  // its place, and there is no base offset.
  void check_alignment(bool transposed) const;
  // Shared address of element (i, k), two bytes each. i counts the rows of A or the columns of B.
  uint32_t at(uint32_t i, uint32_t k, bool transposed) const;
};

}  // namespace emulation
