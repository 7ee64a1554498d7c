// Collectives: what the lanes of a warp do together.
#include <cstring>

#include "block.h"
#include "core.h"

namespace emulation {
namespace {

[[noreturn]] void fail_at_different(const char* name, unsigned mask, const Gathering& other) {
  fail("lanes of one warp are at different collectives: %s with mask 0x%08x here, %s with mask 0x%08x there", name,
       mask, other.name, other.mask);
}

}  // namespace

int lane_id() { return block.current->lane; }

bool gather(const char* name, unsigned mask, void* mine, void* (&all)[32]) {
  Warp& warp = block.own_warp();
  const int lane = block.current->lane;
  const unsigned me = 1u << lane;
  if ((mask & me) == 0) fail("%s: mask 0x%08x leaves out lane %d, which calls it", name, mask, lane);
  Gathering& here = warp.gatherings[__builtin_ctz(mask)];
  if (here.arrived == 0) {
    here.name = name;
    here.mask = mask;
    if ((warp.waiting & mask) != 0)
      for (const Gathering& other : warp.gatherings)
        if ((other.arrived & mask) != 0) fail_at_different(name, mask, other);
  } else if (here.mask != mask || std::strcmp(here.name, name) != 0) {
    fail_at_different(name, mask, here);
  }
  here.lanes[lane] = mine;
  here.arrived |= me;
  if (here.arrived != mask) {
    warp.waiting |= me;
    core::wait(name);
    return false;
  }
  for (int l = 0; l < kWarp; ++l) all[l] = mask >> l & 1 ? here.lanes[l] : nullptr;
  return true;
}

void release(unsigned mask) {
  Warp& warp = block.own_warp();
  warp.gatherings[__builtin_ctz(mask)].arrived = 0;
  warp.waiting &= ~mask;
  warp.ready |= mask;
  warp.known[block.current->warp] = core::tick();
}

}  // namespace emulation
