// Shared by the programs of kernels with one mistake each, which the machine must find. `PROGRAM NAME` runs one kernel
// and prints the error, PROGRAM alone all of them.
#pragma once

#include <cstdio>
#include <cstring>

#include "cuda/ptx.cuh"

namespace torchweld::cuda {

struct Planted {
  const char* name;
  void (*kernel)(float*);
  int threads = 64;
  size_t shared = 64 * sizeof(float);
  unsigned seed = 0, rounding = 0;  // of the machine: some mistakes have no effect in order, or with exact results
  int blocks = 1;
};

template <size_t kCount>
int run_planted(const Planted (&all)[kCount], int count, char** arguments) {
  const unsigned seed = emulation::machine().seed;  // of the environment
  void* memory = nullptr;
  check("planted", cudaMalloc(&memory, 4096));
  for (const Planted& planted : all) {
    if (count > 1 && std::strcmp(planted.name, arguments[1]) != 0) continue;
    try {
      std::memset(memory, 0, 4096);
      emulation::machine().seed = seed + planted.seed;
      emulation::machine().rounding = planted.rounding;
      launch("planted", planted.kernel, dim3(planted.blocks), dim3(planted.threads), planted.shared, nullptr,
             static_cast<float*>(memory));
      std::printf("%s: nothing was found\n", planted.name);
    } catch (const std::exception& error) {
      std::printf("%s: %s\n", planted.name, error.what());
    }
  }
  return 0;
}

}  // namespace torchweld::cuda
