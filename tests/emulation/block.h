// The state of the block that runs: its threads, warps, barriers and clock. Only the machine's own files include this.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "fiber.h"
#include "machine.h"
#include "registers.h"
#include "shared.h"

namespace emulation {

constexpr int kWarp = 32, kNamedBarriers = 16;

struct Index {
  unsigned x, y, z;
};

struct Copy {  // one cp.async
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Thread {
  Fiber fiber;
  Registers registers;
  Index index;
  int id, lane, warp;
  bool done;
  const char* waits_at;  // the name of what the thread waits for, nullptr: nothing
  Votes votes;
  std::vector<Copy> copies;                 // not committed
  std::deque<std::vector<Copy>> in_flight;  // committed groups, the oldest first
};

// The lanes of one mask that have arrived at a collective.
struct Gathering {
  const char* name;
  unsigned mask, arrived = 0;
  Place place;
  void* lanes[kWarp];
};

struct Warp {
  unsigned ready, waiting;  // lanes that can run; lanes at a collective
  Clock known;
  Gathering gatherings[kWarp];  // by the lowest lane of the mask
};

// What one warp has brought to a phase of a barrier.
struct Party {
  unsigned lanes = 0;
  Place place;
};

struct Barrier {
  const char* name;
  int arrived = 0, expected = 0, yes = 0;
  Clock brought;  // what the threads that have arrived know
  std::vector<Thread*> waiting;
  std::vector<Party> parties;  // of the warps
};

struct Block {
  std::vector<std::unique_ptr<Thread>> threads;  // the first `size`; more are kept for their stacks
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  int size = 0, alive = 0;  // threads of the block; those that have not ended
  Thread* current = nullptr;
  uint32_t now = 1;         // counted in meetings of threads, over all launches
  bool deadlocked = false;  // no thread that waits can ever be woken

  // Makes all threads of a block of this size ready to run entry().
  void begin(const uint32_t (&size)[3], void (*entry)());
  Warp& own_warp() { return warps[current->warp]; }
  void wake(Thread& thread) { warps[thread.warp].ready |= 1u << thread.lane; }
  // Suspends the current thread; returns when the scheduler runs it again.
  void suspend() { current->fiber.leave(); }
};

extern Block block;

// into = the later of both, for each warp.
void join(Clock& into, const Clock& from);

}  // namespace emulation
