#include "descriptor.h"

#include <array>

#include "async.h"

namespace emulation {

Descriptor::Descriptor(uint64_t bits)
    : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
      leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
      stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
      swizzle(std::array{0, 128, 64, 32}[bits >> 62]) {
  if ((bits >> 49 & 7) != 0) fail("wgmma: the machine does not know matrices with a base offset");
}

void Descriptor::check_alignment(bool transposed) const {
  if (swizzle == 0) return;
  const uint32_t atom = 8 * static_cast<uint32_t>(swizzle);
  // Steps along K move the start within the first row.
  if (start % atom >= static_cast<uint32_t>(swizzle))
    fail("wgmma: the descriptor begins at shared address %u, in row %u of an atom of %u bytes; expected row 0", start,
         start % atom / swizzle, atom);
  if (stride % atom != 0 || (transposed && leading % atom != 0))
    fail("wgmma: the descriptor has strides of %u and %u bytes, which are not multiples of an atom's %u", leading,
         stride, atom);
}

uint32_t Descriptor::at(uint32_t i, uint32_t k, bool transposed) const {
  const uint32_t width = swizzle == 0 ? 16 : swizzle;  // bytes of a row of the swizzle's atom
  uint32_t offset;
  if (!transposed) {
    offset = i / 8 * stride + i % 8 * width + (swizzle == 0 ? k * 2 / 16 * leading + k * 2 % 16 : k * 2);
  } else if (swizzle == 0) {
    offset = i / 8 * stride + i % 8 * 2 + k / 8 * leading + k % 8 * 16;
  } else {
    offset = i * 2 / width * leading + i * 2 % width + k / 8 * stride + k % 8 * width;
  }
  const uint32_t address = start + offset;
  return swizzle == 0 ? address : address ^ ((address >> 7 & (width / 16 - 1)) << 4);
}

void check_descriptor(uint32_t start, uint32_t leading, uint32_t stride) {
  constexpr uint32_t kEnd = 1 << 18;
  const auto check = [](const char* field, uint32_t value) {
    if (value % 16 != 0 || value >= kEnd)
      fail("wgmma: the %s of a descriptor is %u bytes; expected a multiple of 16 below 2^18", field, value);
  };
  check("start", start);
  check("leading stride", leading);
  check("stride", stride);
}

}  // namespace emulation
