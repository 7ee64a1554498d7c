#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"

namespace emulation {

float approximate(float x, double exact, double ulps) {
  const auto nearest = static_cast<float>(exact);
  // Results at 0 are documented as exact, and so is 0.
  if (machine().rounding == 0 || !std::isfinite(nearest) || nearest == 0.0f || x == 0.0f) return nearest;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  uint64_t hash = (uint64_t{bits} << 32 | machine().rounding) * 0x9e3779b97f4a7c15u;
  hash = (hash ^ hash >> 29) * 0xbf58476d1ce4e5b9u;
  const double share = static_cast<double>(hash >> 11) * 0x1p-52 - 1;  // -1 to 1
  const float magnitude = std::fabs(nearest);
  const double ulp = double{std::nextafter(magnitude, std::numeric_limits<float>::infinity())} - magnitude;
  // The result is rounded once more, by half an ulp. One of a few ulps is as wrong as it may be at every other x.
  const double error = (ulps - 0.5) * ulp * ((hash & 1) != 0 ? std::copysign(1.0, share) : share);
  return static_cast<float>(exact + error);
}

}  // namespace emulation
