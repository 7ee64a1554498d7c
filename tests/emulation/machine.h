// What a test can set about the machine that stands in for a GPU.
#pragma once

namespace emulation {

struct Machine {
  int multiprocessors = 4;
  int shared_bytes_per_block = 232448;  // of a block that has asked for it, as on Hopper
  bool falling = false;                 // whether the threads of a block run in falling order
};

Machine& machine();

}  // namespace emulation
