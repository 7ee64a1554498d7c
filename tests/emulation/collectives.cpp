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

void meet(const char* name, const Place& here, const Place& there) {
  if (here.file == nullptr || there.file == nullptr) return;
  if (here.line == there.line && std::strcmp(here.file, there.file) == 0) return;
  const auto base = [](const char* file) {
    const char* slash = std::strrchr(file, '/');
    return slash != nullptr ? slash + 1 : file;
  };
  fail("lanes of one warp are at different places: %s at %s:%d here, at %s:%d there", name, base(here.file), here.line,
       base(there.file), there.line);
}

int lane_id() { return block->current->lane; }

bool gather(const char* name, unsigned mask, void* mine, void* (&all)[32], Place place) {
  Warp& warp = block->own_warp();
  const int lane = block->current->lane;
  const unsigned me = 1u << lane;
  if ((mask & me) == 0) fail("%s: mask 0x%08x leaves out lane %d, which calls it", name, mask, lane);
  Gathering& here = warp.gatherings[__builtin_ctz(mask)];
  if (here.arrived == 0) {
    here.name = name;
    here.mask = mask;
    here.place = place;
    if ((warp.waiting & mask) != 0)
      for (const Gathering& other : warp.gatherings)
        if ((other.arrived & mask) != 0) fail_at_different(name, mask, other);
  } else if (here.mask != mask || std::strcmp(here.name, name) != 0) {
    fail_at_different(name, mask, here);
  }
  meet(name, place, here.place);
  if (block->current->ordering != nullptr) core::share();
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
  Warp& warp = block->own_warp();
  warp.gatherings[__builtin_ctz(mask)].arrived = 0;
  warp.waiting &= ~mask;
  warp.ready |= mask;
  warp.known.warps[block->current->warp] = core::tick();
}

}  // namespace emulation
