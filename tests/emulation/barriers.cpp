// The named barriers of a block.
#include <algorithm>
#include <cstring>

#include "block.h"
#include "core.h"

namespace emulation {
namespace {

// The current thread arrives.
Barrier& come(const char* name, int id, int count, Place place, bool yes) {
  if (id < 0 || id >= kNamedBarriers) fail("%s: barrier %d, of which there are 16", name, id);
  const int expected = count == kWholeBlock ? block->size : count;
  if (count != kWholeBlock && (count <= 0 || count % kWarp != 0))
    fail("%s: barrier %d for %d threads, which are not whole warps", name, id, count);
  Barrier& here = block->barriers[id];
  if (here.arrived == 0) {
    here.name = name;
    here.expected = expected;
    here.brought = {std::vector<uint32_t>(block->warps.size()), {}};
    here.yes = 0;
    here.parties.assign(block->warps.size(), {});
  }
  if (here.expected != expected)
    fail("%s: barrier %d for %d threads here, for %d there", name, id, expected, here.expected);
  Party& party = here.parties[block->current->warp];
  const unsigned me = 1u << block->current->lane;
  if ((party.lanes & me) != 0)
    fail("%s: warp %d arrives twice in one phase of barrier %d", name, block->current->warp, id);
  if (party.lanes == 0) party.place = place;
  meet(name, place, party.place);
  party.lanes |= me;
  if (block->current->ordering != nullptr) core::share();
  const uint32_t now = core::tick();
  join(here.brought, block->own_warp().known);
  here.brought.warps[block->current->warp] = std::max(here.brought.warps[block->current->warp], now);
  here.yes += yes;
  ++here.arrived;
  return here;
}

// All threads have arrived: those that wait can run.
void open(Barrier& here) {
  for (size_t w = 0; w < here.parties.size(); ++w) {
    const int lanes = std::min(kWarp, block->size - static_cast<int>(w) * kWarp);
    const unsigned whole = 0xffffffffu >> (kWarp - lanes), come = here.parties[w].lanes;
    if (come != 0 && come != whole) fail("%s: only lanes 0x%08x of warp %zu are at the barrier", here.name, come, w);
  }
  const Votes votes{here.yes, here.yes == here.expected, here.yes > 0};
  core::tick();
  for (Thread* thread : here.waiting) {
    thread->votes = votes;
    join(block->warps[thread->warp].known, here.brought);
    block->wake(*thread);
  }
  here.waiting.clear();
  here.arrived = 0;
}

}  // namespace

Votes barrier(const char* name, int id, int count, Place place, bool yes) {
  Barrier& here = come(name, id, count, place, yes);
  if (!here.waiting.empty() && std::strcmp(here.waiting[0]->waits_at, name) != 0)
    fail("threads of one block are at different barriers: %s here, %s there", name, here.waiting[0]->waits_at);
  here.waiting.push_back(block->current);
  if (here.arrived == here.expected)
    open(here);
  else
    core::wait(name);
  return block->current->votes;
}

void arrive(const char* name, int id, int count, Place place) {
  Barrier& here = come(name, id, count, place, false);
  if (here.arrived == here.expected) open(here);
}

}  // namespace emulation
