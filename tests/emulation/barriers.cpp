// The named barriers of a block.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "core.h"

namespace emulation {
namespace {

// The current thread arrives.
Barrier& come(const char* name, int id, int count, bool yes) {
  if (id < 0 || id >= kNamedBarriers) fail("%s: barrier %d, of which there are 16", name, id);
  const int expected = count == kWholeBlock ? block.size : count;
  if (count != kWholeBlock && (count <= 0 || count % kWarp != 0))
    fail("%s: barrier %d for %d threads, which are not whole warps", name, id, count);
  Barrier& here = block.barriers[id];
  if (here.arrived == 0) {
    here.name = name;
    here.expected = expected;
    here.brought.assign(block.warps.size(), 0);
    here.yes = 0;
  }
  if (here.expected != expected)
    fail("%s: barrier %d for %d threads here, for %d there", name, id, expected, here.expected);
  const uint32_t now = core::tick();
  join(here.brought, block.own_warp().known);
  here.brought[block.current->warp] = std::max(here.brought[block.current->warp], now);
  here.yes += yes;
  ++here.arrived;
  return here;
}

// All threads have arrived: those that wait can run.
void open(Barrier& here) {
  const Votes votes{here.yes, here.yes == here.expected, here.yes > 0};
  core::tick();
  for (Thread* thread : here.waiting) {
    thread->votes = votes;
    join(block.warps[thread->warp].known, here.brought);
    block.wake(*thread);
  }
  here.waiting.clear();
  here.arrived = 0;
}

}  // namespace

Votes barrier(const char* name, int id, int count, bool yes) {
  Barrier& here = come(name, id, count, yes);
  if (!here.waiting.empty() && std::strcmp(here.waiting[0]->waits_at, name) != 0)
    fail("threads of one block are at different barriers: %s here, %s there", name, here.waiting[0]->waits_at);
  here.waiting.push_back(block.current);
  if (here.arrived == here.expected)
    open(here);
  else
    core::wait(name);
  return block.current->votes;
}

void arrive(const char* name, int id, int count) {
  Barrier& here = come(name, id, count, false);
  if (here.arrived == here.expected) open(here);
}

}  // namespace emulation
