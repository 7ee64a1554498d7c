#include "block.h"

#include "core.h"

namespace emulation {

static Block first(0);
Block* block = &first;
Shared shared;
Global global;

void Block::begin(uint32_t number_in_grid, const uint32_t (&extents)[3], void (*entry)()) {
  number = number_in_grid;
  deadlocked = false;
  polls = 0;
  size = static_cast<int>(extents[0] * extents[1] * extents[2]);
  alive = size;
  ++now;
  const std::vector<uint32_t> start((size + kWarp - 1) / kWarp, now);
  warps.assign(start.size(), Warp{0, 0, {start, {}}, {}});
  for (Barrier& barrier : barriers) barrier = Barrier{};
  while (threads.size() < static_cast<size_t>(size)) threads.push_back(std::make_unique<Thread>());
  for (int t = 0; t < size; ++t) {
    Thread& thread = *threads[t];
    const auto x = static_cast<unsigned>(t);
    thread.index = {x % extents[0], x / extents[0] % extents[1], x / (extents[0] * extents[1])};
    thread.id = t;
    thread.lane = t % kWarp;
    thread.warp = t / kWarp;
    thread.known = &warps[thread.warp].known;
    thread.ordering.reset();
    thread.done = false;
    thread.waits_at = nullptr;
    thread.copies.clear();
    thread.in_flight.clear();
    thread.registers.begin(thread.fiber);
    thread.fiber.prepare(entry);
    wake(thread);
  }
}

namespace core {

int thread() { return block->current->id; }
int threads() { return block->size; }
size_t slot() { return block->slot; }
Actor actor() { return {static_cast<uint16_t>(block->current->id), block->current->known}; }
uint32_t time() { return Block::now; }
uint32_t tick() { return ++Block::now; }
void learn(int thread, const Clock& clock) { join(block->warps[thread / kWarp].known, clock); }
void wake(int thread) { block->wake(*block->threads[thread]); }

void wait(const char* name) {
  block->current->waits_at = name;
  block->own_warp().ready &= ~(1u << block->current->lane);
  block->suspend();
  if (block->deadlocked) {
    int waiting = 0;
    for (int t = 0; t < block->size; ++t) waiting += !block->threads[t]->done;
    fail("waits for ever at %s: of the %d threads of the block %d wait and %d have ended", name, block->size, waiting,
         block->size - block->alive);
  }
  block->current->waits_at = nullptr;
}

}  // namespace core
}  // namespace emulation
