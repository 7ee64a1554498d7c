// Accesses to memory: the checks of each access, and cp.async.
#include "block.h"
#include "core.h"

namespace emulation {

uint32_t shared_address(const void* pointer) { return shared.address(pointer); }
char* shared_pointer(uint32_t address) { return shared.pointer(address); }

void access(const void* p, size_t bytes, size_t alignment, Kind kind) {
  if (block.current == nullptr) return;
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("misaligned address: %zu bytes at %p", bytes, p);
  if (shared.holds(p))
    shared.access(core::actor(), core::time(), p, bytes, kind);
  else
    block.current->registers.access(p, bytes, core::time());
}

void check_read(const void* pointer, size_t bytes, size_t alignment) { access(pointer, bytes, alignment, Kind::read); }
void check_write(void* pointer, size_t bytes, size_t alignment) { access(pointer, bytes, alignment, Kind::write); }
void check_atomic(void* pointer, size_t bytes) { access(pointer, bytes, bytes, Kind::atomic); }

void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
  if (!shared.holds(to)) fail("cp.async: %p is not in shared memory", to);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) fail("cp.async: misaligned address: %zu bytes at %p", bytes, to);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("cp.async: misaligned address: %zu bytes from %p", bytes, from);
  shared.depart(core::actor(), core::time(), to, bytes);
  block.current->copies.push_back({to, from, bytes, valid});
}

void commit_copies() {
  block.current->in_flight.push_back(std::move(block.current->copies));
  block.current->copies.clear();
}

void wait_for_copies(int groups) {
  auto& in_flight = block.current->in_flight;
  for (; in_flight.size() > static_cast<size_t>(groups); in_flight.pop_front())
    for (const Copy& copy : in_flight.front())
      shared.land(static_cast<uint16_t>(core::thread()), core::time(), copy.to, copy.from, copy.bytes, copy.valid,
                  false);
}

}  // namespace emulation

// ---- The calls that -fsanitize=thread inserts before every access of a kernel

#define TORCHWELD_ACCESS(bytes)                                                                              \
  extern "C" void __tsan_read##bytes(void* p) { emulation::access(p, bytes, bytes, emulation::Kind::read); } \
  extern "C" void __tsan_write##bytes(void* p) { emulation::access(p, bytes, bytes, emulation::Kind::write); }
TORCHWELD_ACCESS(1)
TORCHWELD_ACCESS(2)
TORCHWELD_ACCESS(4)
TORCHWELD_ACCESS(8)
TORCHWELD_ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { emulation::access(p, bytes, 1, emulation::Kind::read); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { emulation::access(p, bytes, 1, emulation::Kind::write); }
extern "C" void __tsan_init() {}
