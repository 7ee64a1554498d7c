#include "fences.h"

#include <algorithm>

#include "block.h"
#include "core.h"

namespace emulation {

Released released;

namespace {

constexpr int kBlock = static_cast<int>(Scope::block), kDevice = static_cast<int>(Scope::device);

}  // namespace

void fence(Scope scope) {
  Thread& thread = *block->current;
  if (thread.ordering == nullptr) thread.ordering = std::make_unique<Ordering>();
  Ordering& own = *thread.ordering;
  for (int s = kBlock; s <= static_cast<int>(scope); ++s) {
    join(own.learned, own.acquired[s]);
    own.acquired[s].clear();
  }
  Others known = thread.known->blocks;
  join(known, own.learned);
  Seen& here = known[block->number];
  join(here.warps, thread.known->warps);
  here.threads[static_cast<uint16_t>(thread.id)] = ++Block::now;
  if (scope == Scope::device) own.released[kDevice] = known;
  own.released[kBlock] = std::move(known);
}

void core::share() {
  Ordering* own = block->current->ordering.get();
  if (own == nullptr || own->learned.empty()) return;
  join(block->current->known->blocks, own->learned);
  own->learned.clear();
}

void Released::access(const void* word, Kind kind) {
  std::unique_ptr<Ordering>& own = block->current->ordering;
  if (own == nullptr && words_.empty()) return;
  const auto at = reinterpret_cast<uintptr_t>(word);
  const auto found = words_.find(at);
  if (kind != Kind::volatile_write && found != words_.end()) {
    if (own == nullptr) own = std::make_unique<Ordering>();
    join(own->acquired[kDevice], found->second.to_all);
    join(own->acquired[kBlock], found->second.within[block->number]);
  }
  if (kind == Kind::volatile_read) return;
  // A store ends what earlier ones have released. An atomic function hands it on.
  if (kind == Kind::volatile_write && found != words_.end()) words_.erase(found);
  if (own == nullptr) return;
  Word& released = words_[at];
  join(released.to_all, own->released[kDevice]);
  join(released.within[block->number], own->released[kBlock]);
}

}  // namespace emulation
