// Accesses to memory: the checks of each access, and cp.async.
#include <link.h>

#include <algorithm>

#include "block.h"
#include "core.h"

namespace emulation {
namespace {

// The static memory of this library or program: constants, and the counters of coverage.
struct Image {
  uintptr_t begin, size;
};
const Image image = [] {
  static Image found{};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        uintptr_t begin = ~uintptr_t{0}, end = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
          const uintptr_t first = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          begin = std::min(begin, first);
          end = std::max<uintptr_t>(end, first + info->dlpi_phdr[i].p_memsz);
        }
        if (reinterpret_cast<uintptr_t>(data) - begin >= end - begin) return 0;
        *static_cast<Image*>(data) = {begin, end - begin};
        return 1;
      },
      &found);
  return found;
}();

void access_memory(const Thread& thread, const void* p, size_t bytes, Kind kind) {
  const auto id = static_cast<uint16_t>(thread.id);
  if (shared.holds(p))
    shared.access({id, thread.known}, Block::now, p, bytes, kind);
  else
    global.access({id, thread.known, thread.ordering != nullptr ? &thread.ordering->learned : nullptr}, p, bytes, kind);
}

// `alignment` is a power of two. Most accesses are to counters and to the stack.
inline void access(const void* p, size_t bytes, size_t alignment, Kind kind) {
  if (reinterpret_cast<uintptr_t>(p) - image.begin < image.size) return;
  Thread* thread = block->current;
  if (thread == nullptr) return;
  if ((reinterpret_cast<uintptr_t>(p) & (alignment - 1)) != 0) fail("misaligned address: %zu bytes at %p", bytes, p);
  if (Fiber::holds(p))
    thread->registers.access(p, bytes, Block::now);
  else
    access_memory(*thread, p, bytes, kind);
}

// A volatile access is an atomic one that other threads may wait for.
void access_volatile(const void* p, size_t bytes, Kind kind) {
  const bool in_global = block->current != nullptr && !shared.holds(p) && !Fiber::holds(p);
  if (block->current != nullptr && kind == Kind::volatile_read) yield();
  access(p, bytes, bytes, in_global ? kind : kind == Kind::volatile_read ? Kind::read : Kind::write);
  if (in_global) released.access(p, kind);
}

}  // namespace

uint32_t shared_address(const void* pointer) { return shared.address(pointer); }
char* shared_pointer(uint32_t address) { return shared.pointer(address); }

void check_read(const void* pointer, size_t bytes, size_t alignment) { access(pointer, bytes, alignment, Kind::read); }
void check_write(void* pointer, size_t bytes, size_t alignment) { access(pointer, bytes, alignment, Kind::write); }
void check_atomic(void* pointer, size_t bytes) {
  access(pointer, bytes, bytes, Kind::atomic);
  if (block->current != nullptr && !shared.holds(pointer)) released.access(pointer, Kind::atomic);
}
void check_constant(const void* pointer, size_t bytes) {
  if (block->current == nullptr) return;
  if (shared.holds(pointer)) fail("ld.global.nc: %p is an address of shared memory", pointer);
  access(pointer, bytes, bytes, Kind::constant);
}

void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
  if (!shared.holds(to)) fail("cp.async: %p is not in shared memory", to);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) fail("cp.async: misaligned address: %zu bytes at %p", bytes, to);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("cp.async: misaligned address: %zu bytes from %p", bytes, from);
  access(from, valid, 1, Kind::read);
  shared.depart(core::actor(), Block::now, to, bytes);
  block->current->copies.push_back({to, from, bytes, valid, Block::now});
}

void commit_copies() {
  block->current->in_flight.push_back(std::move(block->current->copies));
  block->current->copies.clear();
}

void wait_for_copies(int groups) {
  auto& in_flight = block->current->in_flight;
  for (; in_flight.size() > static_cast<size_t>(groups); in_flight.pop_front())
    for (const Copy& copy : in_flight.front()) {
      global.check_unwritten(copy.from, copy.valid, copy.issued);
      shared.land(static_cast<uint16_t>(core::thread()), Block::now, copy.to, copy.from, copy.bytes, copy.valid, false);
    }
}

}  // namespace emulation

// ---- The calls that -fsanitize=thread inserts before every access of a kernel

#define TORCHWELD_ACCESS(bytes)                                                                                \
  extern "C" void __tsan_read##bytes(void* p) { emulation::access(p, bytes, bytes, emulation::Kind::read); }   \
  extern "C" void __tsan_write##bytes(void* p) { emulation::access(p, bytes, bytes, emulation::Kind::write); } \
  extern "C" void __tsan_volatile_read##bytes(void* p) {                                                       \
    emulation::access_volatile(p, bytes, emulation::Kind::volatile_read);                                      \
  }                                                                                                            \
  extern "C" void __tsan_volatile_write##bytes(void* p) {                                                      \
    emulation::access_volatile(p, bytes, emulation::Kind::volatile_write);                                     \
  }
TORCHWELD_ACCESS(1)
TORCHWELD_ACCESS(2)
TORCHWELD_ACCESS(4)
TORCHWELD_ACCESS(8)
TORCHWELD_ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { emulation::access(p, bytes, 1, emulation::Kind::read); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { emulation::access(p, bytes, 1, emulation::Kind::write); }
extern "C" void __tsan_init() {}
