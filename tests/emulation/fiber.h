// A fiber: a stack and a place in a program, entered and left by a switch of a few instructions.
#pragma once

#include <cstddef>

namespace emulation {

class Fiber {
 public:
  // Makes the fiber begin with entry(), which must not return, when it is next entered.
  void prepare(void (*entry)());

  void enter();         // from the scheduler, until the fiber gives way
  void leave();         // from the fiber, back to the scheduler
  static void began();  // the first thing that entry() calls

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

 private:
  static constexpr size_t kStack = 128 * 1024;
  void* place_ = nullptr;
  char* stack_ = nullptr;
  void* shadow_ = nullptr;  // AddressSanitizer's
};

}  // namespace emulation
