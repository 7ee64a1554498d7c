// Shared memory and what is known about each of its bytes: who wrote and who read it last, and when. Time is counted in
// meetings of threads, not in instructions: of two accesses one comes before the other if the same thread made them, or
// if a barrier, a collective or another synchronisation that both took part in lies between. If neither does and one of
// them writes, it is a race, whichever came first in this run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulation {

// For each warp the time up to which what it did is known.
using Clock = std::vector<uint32_t>;

enum class Kind { read, write, atomic };

// The thread that runs, as the checks see it.
struct Actor {
  uint16_t thread;     // of the cluster
  const Clock* known;  // by its warp
};

class Shared {
 public:
  // Finds the memory of the thread that calls, which must be the one that launches.
  void begin_launch(size_t dynamic_bytes);
  void begin_block(uint32_t now, unsigned char poison);

  bool holds(const void* p) const { return reinterpret_cast<uintptr_t>(p) - base_ < size_; }
  void access(const Actor& actor, uint32_t now, const void* p, size_t bytes, Kind kind);

  // Between the issue of an asynchronous copy to here and its landing nobody may touch the bytes. They land as what
  // `thread` has written, which the asynchronous (`seen`: it is one of them) see after a fence only.
  void depart(const Actor& actor, uint32_t now, void* p, size_t bytes);
  void land(uint16_t thread, uint32_t now, void* p, const void* from, size_t bytes, size_t valid, bool seen);

  // While an asynchronous instruction may read the bytes nobody may write them. It sees what its thread or, before, the
  // writer has fenced; fences[t]: when thread t last did.
  void lend(const Actor& actor, uint32_t now, const void* p, size_t bytes, const std::vector<uint32_t>& fences);
  void give_back(uint16_t thread, uint32_t now, const void* p, size_t bytes);

  uint32_t address(const void* p) const;
  char* pointer(uint32_t address) const;

 private:
  static constexpr uint32_t kFirstAddress = 1024;  // so that 0 is nothing
  struct Byte {
    uint32_t written = 0, read[2] = {};
    uint16_t writer = 0, reader[2] = {};
    bool atomic = false, in_flight = false, landed = false;
    uint16_t lent = 0;
  };

  Byte* bytes_of(const void* p, size_t bytes);
  void place(const void* p, char (&text)[64]) const;

  uintptr_t base_ = 0;  // of all memory that kernels declare __shared__
  size_t size_ = 0;
  char* dynamic_ = nullptr;
  size_t dynamic_size_ = 0;
  uint32_t begin_ = 0;
  std::vector<Byte> bytes_;
};

}  // namespace emulation
