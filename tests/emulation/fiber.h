// A fiber: a stack and a place in a program. A switch to or from a fiber takes a few instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

class Fiber {
 public:
  // The next enter() starts entry(), which must not return.
  void prepare(void (*entry)());

  void enter();         // called by the scheduler; returns when the fiber leaves
  void leave();         // called by the fiber; returns when the scheduler enters it again
  static void began();  // the first call in entry()

  // The bytes of its stack.
  const char* stack() const { return stack_; }
  static constexpr size_t size() { return kStack; }
  // True for an address in the stack of any fiber.
  static bool holds(const void* p) { return reinterpret_cast<uintptr_t>(p) - stacks_ < kMost * kStack; }

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStack = 512 * 1024;  // its locals lie far apart
#else
  static constexpr size_t kStack = 128 * 1024;
#endif
  static constexpr size_t kMost = 32768;  // fibers

  static inline uintptr_t stacks_ = 0;  // of all fibers, side by side
  static inline size_t taken_ = 0;      // fibers that have one
  void* place_ = nullptr;
  char* stack_ = nullptr;
  void* shadow_ = nullptr;  // of AddressSanitizer
};

}  // namespace emulation
