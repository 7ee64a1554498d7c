// The first error of a launch: what a thread did wrong, and where.
#pragma once

#include <signal.h>

#include <string>

#include "block.h"
#include "report.h"

namespace emulation {

struct Failure {
  std::string message;  // empty: none
  const Thread* thread = nullptr;
  Trace trace;
};
extern Failure failure;

// "[kernel] block (x, y, z) thread (x, y, z), lines: "
std::string place_of(const Failure& failure, const void* kernel, const Index& block);

// While it lives, an invalid access of a kernel is an error like any other.
class Signals {
 public:
  Signals();
  ~Signals();

 private:
  static constexpr int kCaught[] = {SIGSEGV, SIGBUS, SIGFPE};
  static void caught(int number, siginfo_t* info, void*);
  struct sigaction before_[3];
  stack_t stack_before_;
};

}  // namespace emulation
