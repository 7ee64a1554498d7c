// What memory fences and atomic accesses order: a fence, an atomic access that writes a word, an atomic access of
// another thread that reads the word, and a fence of that thread. All before the first then comes before all after the
// last.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "clock.h"
#include "machine.h"

namespace emulation {

// Of one thread. The arrays are by Scope: for threads of the own block, for all.
struct Ordering {
  Others released[2];  // what its last fence lets its atomic accesses release
  Others acquired[2];  // what its atomic accesses have read, and no fence has made known yet
  Others learned;      // what fences have made known, and its warp does not know yet
};

// What the words of global memory that atomic accesses have written release to those that read them.
class Released {
 public:
  void begin_launch() { words_.clear(); }
  // The running thread's access, which is atomic or volatile.
  void access(const void* word, Kind kind);

 private:
  struct Word {
    Others to_all;
    std::unordered_map<uint32_t, Others> within;  // by block
  };
  std::unordered_map<uintptr_t, Word> words_;
};
extern Released released;

}  // namespace emulation
