#include "failure.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace emulation {

Failure failure;

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (block->current == nullptr) throw std::runtime_error(text);
  failure.message = text;
  failure.thread = block->current;
  failure.trace.take();
  block->suspend();
  std::abort();  // the scheduler never runs a thread that has failed
}

std::string place_of(const Failure& failure, const void* kernel, const Index& block) {
  const auto triple = [](const Index& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  std::string text = "[" + function_name(kernel) + "] block " + triple(block);
  if (failure.thread != nullptr)
    text += " thread " + triple(failure.thread->index) + ", " + source_lines(failure.trace);
  return text + ": ";
}

void Signals::caught(int number, siginfo_t* info, void*) {
  if (block->current == nullptr) {  // not a kernel's
    signal(number, SIG_DFL);
    return;
  }
  fail(number == SIGFPE ? "arithmetic error at %p" : "invalid address %p", info->si_addr);
}

Signals::Signals() {
  static char memory[64 * 1024];
  const stack_t stack{memory, 0, sizeof(memory)};
  sigaltstack(&stack, &stack_before_);
  struct sigaction action{};
  action.sa_sigaction = caught;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (int i = 0; i < 3; ++i) sigaction(kCaught[i], &action, &before_[i]);
}

Signals::~Signals() {
  for (int i = 0; i < 3; ++i) sigaction(kCaught[i], &before_[i], nullptr);
  sigaltstack(&stack_before_, nullptr);
}

}  // namespace emulation
