// Shared memory, and for each of its bytes the last writer, the last readers, and when they accessed it. The clock
// counts meetings of threads, not instructions. Of two accesses one comes first if the same thread made them, or if a
// barrier, a collective or another synchronisation of both threads lies between. If neither comes first and one of them
// writes, that is a race, in whichever order they ran.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "clock.h"

namespace emulation {

// The running thread, as the checks see it.
struct Actor {
  uint16_t thread;     // index in the block
  const Clock* known;  // what its warp knows
};

class Shared {
 public:
  struct Byte {
    uint32_t written = 0, read[2] = {};
    uint16_t writer = 0, reader[2] = {};
    bool atomic = false, in_flight = false, landed = false;
    uint16_t lent = 0;
  };
  // The shared memory of one block in flight. All blocks have it at the same addresses: while another block runs, its
  // contents are kept aside.
  struct Memory {
    struct Free {
      void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<Byte[], Free> bytes;
    std::vector<char> aside;
    uint32_t begin = 0;
  };

  // Finds the shared memory of the calling thread, which must be the one that launches.
  void begin_launch(size_t dynamic_bytes);
  void begin_block(Memory& memory, uint32_t now, unsigned char poison);
  void leave(Memory& memory);      // keeps the contents aside
  void return_to(Memory& memory);  // restores them

  bool holds(const void* p) const { return reinterpret_cast<uintptr_t>(p) - base_ < size_; }
  void access(const Actor& actor, uint32_t now, const void* p, size_t bytes, Kind kind);

  // From the issue of an asynchronous copy until it arrives, no thread may touch the bytes. Then they count as written
  // by `thread`. Asynchronous instructions see them after a fence, or at once if the copy was a bulk copy (`seen`).
  void depart(const Actor& actor, uint32_t now, void* p, size_t bytes);
  void land(uint16_t thread, uint32_t now, void* p, const void* from, size_t bytes, size_t valid, bool seen);

  // While an asynchronous instruction may read the bytes, no thread may write them. The instruction sees what its own
  // thread or the writer has fenced. fences[t] is the time of the last fence of thread t.
  void lend(const Actor& actor, uint32_t now, const void* p, size_t bytes, const std::vector<uint32_t>& fences);
  void give_back(uint16_t thread, uint32_t now, const void* p, size_t bytes);

  uint32_t address(const void* p) const;
  char* pointer(uint32_t address) const;

 private:
  Byte* bytes_of(const void* p, size_t bytes);
  template <class F>
  void each_part(F&& f) const;  // f(first, bytes) of what a block of this launch can use
  void place(const void* p, char (&text)[64]) const;

  uintptr_t base_ = 0;  // all memory that kernels declare __shared__
  size_t size_ = 0;
  char* dynamic_ = nullptr;
  size_t dynamic_size_ = 0;
  uint32_t first_address_ = 0;  // of dynamic_: no more than a multiple of 16, and address 0 is invalid
  Byte* bytes_ = nullptr;       // of the block that runs
  uint32_t begin_ = 0;          // when it began
};

}  // namespace emulation
