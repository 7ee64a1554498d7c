// The state of a block in flight: its threads, warps and barriers. Only the machine's own files include this.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "fences.h"
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
  uint32_t issued;
};

struct Thread {
  Fiber fiber;
  Registers registers;
  Index index;
  int id, lane, warp;
  Clock* known;  // its warp's
  bool done;
  const char* waits_at;  // the name of what the thread waits for, nullptr: nothing
  Votes votes;
  std::unique_ptr<Ordering> ordering;       // nullptr: neither a fence nor an atomic access has ordered anything
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
  static inline uint32_t now = 1;  // the clock of all blocks, over all launches
  static inline int idle = 0;      // how often a thread has let others run since something was done

  explicit Block(size_t slot) : slot(slot) {}
  const size_t slot;                             // among the blocks in flight
  uint32_t number = 0;                           // in the grid
  std::vector<std::unique_ptr<Thread>> threads;  // the first `size`; more are kept for their stacks
  std::vector<Warp> warps;
  Barrier barriers[kNamedBarriers];
  Shared::Memory memory;
  int size = 0, alive = 0;  // threads of the block; those that have not ended
  Thread* current = nullptr;
  bool deadlocked = false;  // no thread that waits can ever be woken
  int polls = 0;            // since it last wrote to global memory: how often a thread let others run

  // Makes all threads of block `number`, of this size, ready to run entry().
  void begin(uint32_t number, const uint32_t (&size)[3], void (*entry)());
  Warp& own_warp() { return warps[current->warp]; }
  void wake(Thread& thread) { warps[thread.warp].ready |= 1u << thread.lane; }
  // Suspends the current thread; returns when the scheduler runs it again.
  void suspend() { current->fiber.leave(); }
};

extern Block* block;  // the one that runs

}  // namespace emulation
