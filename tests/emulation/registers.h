// The registers of a thread that products of warpgroups use: local variables, which lie on its stack. From the first
// wgmma.fence of a block on, the machine records when the kernel accesses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "fiber.h"

namespace emulation {

class Registers {
 public:
  void begin(const Fiber& fiber);
  void watch();  // records accesses from now on

  // Called for every access of the kernel that is not to shared memory. Fails for registers of a product in flight.
  void access(const void* p, size_t bytes, uint32_t now) {
    if (watched_ && reinterpret_cast<uintptr_t>(p) - stack_ < Fiber::size()) record(p, bytes, now);
  }
  bool touched_since(const void* p, size_t bytes, uint32_t time) const;

  void lend(const void* p, size_t bytes);
  void give_back(const void* p);

 private:
  struct Lent {
    uintptr_t begin, end;
  };
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  void record(const void* p, size_t bytes, uint32_t now);

  uintptr_t stack_ = 0;
  bool watched_ = false;
  std::unique_ptr<uint32_t[], Free> times_;  // of the last access to each word of the stack
  std::vector<Lent> lent_;
};

}  // namespace emulation
