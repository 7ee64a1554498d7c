// Source positions as text.
#pragma once

#include <string>

namespace emulation {

struct Trace {
  static constexpr int kMost = 24;
  void* addresses[kMost];
  int count = 0;

  void take();  // the stack of the caller
};

std::string function_name(const void* code);  // "torchweld::cuda::(anonymous namespace)::step(...)" -> "step"
std::string source_lines(
    const Trace& trace);  // "norm/layer_norm.cuh:110, called from norm/forward.cu:99", without lines of the machine

}  // namespace emulation
