// Mean and variance of a row in two passes, the second correcting the first, on the CPU and on a GPU alike. Chan,
// Golub, LeVeque: Algorithms for Computing the Sample Variance (the corrected two-pass algorithm).
#pragma once

#include "philox.h"  // TW_HOST_DEVICE

namespace torchweld {
namespace {

// The mean is mean + rest: a float, and what a float cannot hold of the mean where that is far above the deviation.
struct Moments {
  float mean, rest, variance;
};

// Whether the deviations from `mean`, summed as for corrected(), are nearly all its own roundings: then they tell
// little of the numbers, and are to be summed about mean + sum / count.
TW_HOST_DEVICE bool is_coarse(float sum, float squares, float count) {
  const float rest = sum / count;
  return rest != 0.0f && squares - sum * rest <= 0.01f * squares;
}

// Of `count` numbers, given the sums of them less `mean` and of the squares of that. `mean` is off by its roundings.
TW_HOST_DEVICE Moments corrected(float mean, float sum, float squares, float count) {
  if (squares == __builtin_inff()) return {0.0f, 0.0f, squares};  // beyond float32, where torch gives zeros or NaN
  const float rest = sum / count, about_mean = squares - sum * rest;
  // Equal numbers: what is left of the squares is their own rounding, and mean + rest is the number.
  if (about_mean <= 1e-5f * squares) return {mean + rest, 0.0f, 0.0f};
  return {mean, rest, about_mean / count};
}

}  // namespace
}  // namespace torchweld
