#include "async.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>

#include "core.h"

namespace emulation {
namespace {

struct Mbarrier {
  uint32_t count, pending, phase = 0;
  int64_t bytes = 0;  // expected and not yet arrived
  Clock brought;      // what the threads that have arrived, in any phase, know
  std::vector<int> waiting;
};

// A bulk copy in flight.
struct Bulk {
  int thread;
  bool store;
  std::vector<Piece> pieces;
  uint32_t mbarrier;
  Reduction reduction;
  Clock known;  // what the issuing thread knows
  int group;    // of that thread's stores
};

struct State {  // of a block
  std::map<uint32_t, Mbarrier> mbarriers;
  std::deque<Bulk> bulks;
  std::vector<int> groups;       // how many groups of stores each thread has committed
  std::vector<uint32_t> fences;  // the time of each thread's last fence.proxy.async
};
core::PerBlock<State> own;

Mbarrier& mbarrier_at(const char* name, uint32_t address) {
  check_atomic(shared_pointer(address), 8);
  const auto found = own->mbarriers.find(address);
  if (found == own->mbarriers.end()) fail("%s: no mbarrier has been initialised at shared address %u", name, address);
  return found->second;
}

void end_phase_if_due(Mbarrier& m) {
  if (m.pending > 0 || m.bytes != 0) return;
  ++m.phase;
  m.pending = m.count;
  core::tick();
  for (const int thread : m.waiting) {
    core::learn(thread, m.brought);
    core::wake(thread);
  }
  m.waiting.clear();
}

void bring(Mbarrier& m, const Clock& known, int thread) {
  join(m.brought, known);
  uint32_t& own_warp = m.brought.warps[thread / 32];
  own_warp = std::max(own_warp, core::tick());
}

void add(void* to, const void* from, size_t bytes, Reduction reduction) {
  const size_t size = reduction == Reduction::add_float ? 4 : 2;
  for (size_t i = 0; i < bytes; i += size) {
    uint32_t a = 0, b = 0;
    std::memcpy(&a, static_cast<char*>(to) + i, size);
    std::memcpy(&b, static_cast<const char*>(from) + i, size);
    if (size == 2) a <<= 16, b <<= 16;
    float x, y;
    std::memcpy(&x, &a, 4);
    std::memcpy(&y, &b, 4);
    x += y;
    std::memcpy(&a, &x, 4);
    if (size == 2) a = a + 0x7fff + (a >> 16 & 1) >> 16;
    std::memcpy(static_cast<char*>(to) + i, &a, size);
  }
}

// A bulk copy may access global memory from its issue until it arrives, and does so in the name of its thread.
void touch_global(uint16_t thread, const Clock& known, const Piece& piece, bool store, Reduction reduction) {
  const Kind kind = !store ? Kind::read : reduction == Reduction::none ? Kind::write : Kind::atomic;
  if (piece.global != nullptr) global.access({thread, &known, nullptr}, piece.global, piece.bytes, kind);
}

void arrive(const Bulk& bulk) {
  const auto thread = static_cast<uint16_t>(bulk.thread);
  static const char zeros[256] = {};
  uint32_t bytes = 0;
  for (const Piece& piece : bulk.pieces) {
    char* memory = shared_pointer(piece.shared);
    bytes += piece.bytes;
    touch_global(thread, bulk.known, piece, bulk.store, bulk.reduction);
    if (!bulk.store) {
      shared.land(thread, core::time(), memory, piece.global != nullptr ? piece.global : zeros, piece.bytes,
                  piece.bytes, true);
    } else {
      if (piece.global != nullptr && bulk.reduction == Reduction::none) std::memcpy(piece.global, memory, piece.bytes);
      if (piece.global != nullptr && bulk.reduction != Reduction::none)
        add(piece.global, memory, piece.bytes, bulk.reduction);
      shared.give_back(thread, core::time(), memory, piece.bytes);
    }
  }
  if (bulk.store) return;
  Mbarrier& m = own->mbarriers.at(bulk.mbarrier);
  m.bytes -= bytes;
  bring(m, bulk.known, bulk.thread);
  end_phase_if_due(m);
}

void arrive(size_t number) {
  const Bulk bulk = std::move(own->bulks[number]);
  own->bulks.erase(own->bulks.begin() + static_cast<ptrdiff_t>(number));
  arrive(bulk);
}

}  // namespace

namespace core {

void begin_block() {
  *own = {{}, {}, std::vector<int>(threads()), std::vector<uint32_t>(threads())};
  begin_products();
  begin_registers();
}

bool land(bool nothing_else) {
  // As late as possible, so that a missing wait shows; sometimes at random.
  if (own->bulks.empty() || (!nothing_else && core::random() % 8 != 1)) return false;
  arrive(core::random() % own->bulks.size());
  return true;
}

void end_block() {
  end_products();
  end_registers();
  for (const Bulk& bulk : own->bulks)
    fail(bulk.store ? "the block has ended while a bulk store of thread %d still reads its shared memory"
                    : "the block has ended while a bulk load of thread %d is on its way to its shared memory",
         bulk.thread);
}

}  // namespace core

void mbarrier_init(uint32_t address, uint32_t count) {
  check_write(shared_pointer(address), 8, 8);
  if (count == 0 || count >= 1u << 20) fail("mbarrier.init: a count of %u, which must be 1 to 2^20 - 1", count);
  Mbarrier m{count, count};
  m.brought.warps.resize(core::actor().known->warps.size());
  own->mbarriers[address] = m;
}

void mbarrier_expect(uint32_t address, uint32_t bytes) { mbarrier_at("mbarrier.expect_tx", address).bytes += bytes; }

void mbarrier_arrive(uint32_t address) {
  Mbarrier& m = mbarrier_at("mbarrier.arrive", address);
  if (m.pending == 0) fail("mbarrier.arrive: more threads than the %u that the mbarrier counts", m.count);
  --m.pending;
  core::share();
  bring(m, *core::actor().known, core::thread());
  end_phase_if_due(m);
}

bool mbarrier_test(uint32_t address, uint32_t parity) {
  Mbarrier& m = mbarrier_at("mbarrier.test_wait", address);
  yield();
  if ((m.phase & 1) == parity) return false;
  core::learn(core::thread(), m.brought);
  return true;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
  Mbarrier& m = mbarrier_at("mbarrier.try_wait", address);
  if ((m.phase & 1) != parity) return core::learn(core::thread(), m.brought);
  m.waiting.push_back(core::thread());
  core::wait("mbarrier.try_wait");
}

void fence_async() { own->fences[core::thread()] = core::tick(); }

void bulk_load(std::vector<Piece> pieces, uint32_t address) {
  mbarrier_at("cp.async.bulk", address);
  core::share();
  const Actor actor = core::actor();
  for (const Piece& piece : pieces) {
    touch_global(actor.thread, *actor.known, piece, false, Reduction::none);
    shared.depart(actor, core::time(), shared_pointer(piece.shared), piece.bytes);
  }
  own->bulks.push_back({core::thread(), false, std::move(pieces), address, Reduction::none, *core::actor().known, 0});
}

void bulk_store(std::vector<Piece> pieces, Reduction reduction) {
  core::share();
  const Actor actor = core::actor();
  for (const Piece& piece : pieces) {
    touch_global(actor.thread, *actor.known, piece, true, reduction);
    shared.lend(actor, core::time(), shared_pointer(piece.shared), piece.bytes, own->fences);
  }
  const int group = own->groups[core::thread()];
  own->bulks.push_back({core::thread(), true, std::move(pieces), 0, reduction, *core::actor().known, group});
}

void bulk_commit() { ++own->groups[core::thread()]; }

void bulk_wait(int newest) {
  const int thread = core::thread(), oldest_left = own->groups[thread] - newest;
  for (size_t i = 0; i < own->bulks.size();) {
    const Bulk& bulk = own->bulks[i];
    if (bulk.store && bulk.thread == thread && bulk.group < oldest_left)
      arrive(i);
    else
      ++i;
  }
}

const std::vector<uint32_t>& async_fences() { return own->fences; }

}  // namespace emulation
