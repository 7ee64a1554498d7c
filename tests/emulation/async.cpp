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

std::map<uint32_t, Mbarrier> mbarriers;
std::deque<Bulk> bulks;
std::vector<int> groups;       // how many groups of stores each thread has committed
std::vector<uint32_t> fences;  // the time of each thread's last fence.proxy.async

Mbarrier& mbarrier_at(const char* name, uint32_t address) {
  check_atomic(shared_pointer(address), 8);
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) fail("%s: no mbarrier has been initialised at shared address %u", name, address);
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
  for (size_t i = 0; i < known.size(); ++i) m.brought[i] = std::max(m.brought[i], known[i]);
  m.brought[thread / 32] = std::max(m.brought[thread / 32], core::tick());
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

void arrive(const Bulk& bulk) {
  const auto thread = static_cast<uint16_t>(bulk.thread);
  static const char zeros[256] = {};
  uint32_t bytes = 0;
  for (const Piece& piece : bulk.pieces) {
    char* memory = shared_pointer(piece.shared);
    bytes += piece.bytes;
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
  Mbarrier& m = mbarriers.at(bulk.mbarrier);
  m.bytes -= bytes;
  bring(m, bulk.known, bulk.thread);
  end_phase_if_due(m);
}

void arrive(size_t number) {
  const Bulk bulk = std::move(bulks[number]);
  bulks.erase(bulks.begin() + static_cast<ptrdiff_t>(number));
  arrive(bulk);
}

}  // namespace

namespace core {

void begin_block() {
  mbarriers.clear();
  bulks.clear();
  groups.assign(threads(), 0);
  fences.assign(threads(), 0);
  begin_products();
  begin_registers();
}

bool land(bool nothing_else) {
  // As late as possible, so that a missing wait shows; sometimes at random.
  if (bulks.empty() || (!nothing_else && core::random() % 8 != 1)) return false;
  arrive(core::random() % bulks.size());
  return true;
}

void end_block() {
  end_products();
  end_registers();
  for (const Bulk& bulk : bulks)
    fail(bulk.store ? "the block has ended while a bulk store of thread %d still reads its shared memory"
                    : "the block has ended while a bulk load of thread %d is on its way to its shared memory",
         bulk.thread);
}

}  // namespace core

void mbarrier_init(uint32_t address, uint32_t count) {
  check_write(shared_pointer(address), 8, 8);
  if (count == 0 || count >= 1u << 20) fail("mbarrier.init: a count of %u, which must be 1 to 2^20 - 1", count);
  Mbarrier m{count, count};
  m.brought.assign(core::actor().known->size(), 0);
  mbarriers[address] = m;
}

void mbarrier_expect(uint32_t address, uint32_t bytes) { mbarrier_at("mbarrier.expect_tx", address).bytes += bytes; }

void mbarrier_arrive(uint32_t address) {
  Mbarrier& m = mbarrier_at("mbarrier.arrive", address);
  if (m.pending == 0) fail("mbarrier.arrive: more threads than the %u that the mbarrier counts", m.count);
  --m.pending;
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

void fence_async() { fences[core::thread()] = core::tick(); }

void bulk_load(std::vector<Piece> pieces, uint32_t address) {
  mbarrier_at("cp.async.bulk", address);
  for (const Piece& piece : pieces)
    shared.depart(core::actor(), core::time(), shared_pointer(piece.shared), piece.bytes);
  bulks.push_back({core::thread(), false, std::move(pieces), address, Reduction::none, *core::actor().known, 0});
}

void bulk_store(std::vector<Piece> pieces, Reduction reduction) {
  for (const Piece& piece : pieces)
    shared.lend(core::actor(), core::time(), shared_pointer(piece.shared), piece.bytes, fences);
  const int group = groups[core::thread()];
  bulks.push_back({core::thread(), true, std::move(pieces), 0, reduction, *core::actor().known, group});
}

void bulk_commit() { ++groups[core::thread()]; }

void bulk_wait(int newest) {
  const int thread = core::thread(), oldest_left = groups[thread] - newest;
  for (size_t i = 0; i < bulks.size();) {
    if (bulks[i].store && bulks[i].thread == thread && bulks[i].group < oldest_left)
      arrive(i);
    else
      ++i;
  }
}

const std::vector<uint32_t>& async_fences() { return fences; }

}  // namespace emulation
