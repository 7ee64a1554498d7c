#include "shared.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cuda_runtime.h"
#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
  #include <sanitizer/asan_interface.h>
#else
  #define __asan_poison_memory_region(memory, bytes)
  #define __asan_unpoison_memory_region(memory, bytes)
#endif

namespace torchweld::cuda {

// The most that a block can have, and some beyond it, so that an overrun is seen. Whatever a kernel declares __shared__
// is thread-local, and nothing else here is: the thread-local memory of this library is shared memory.
constexpr size_t kMost = 232448, kBeyond = 65536;
extern thread_local uint4 shared_memory[];
alignas(1024) thread_local uint4 shared_memory[(kMost + kBeyond) / 16];

}  // namespace torchweld::cuda

namespace emulation {
namespace {

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer's calls replace ours in the kernels. The machine does not see their writes and checks bounds only.
constexpr bool kSeesAll = false;
#else
constexpr bool kSeesAll = true;
#endif

struct Segment {
  uintptr_t inside;
  uintptr_t base;
  size_t size;
};

int find_segment(dl_phdr_info* info, size_t, void* data) {
  auto& found = *static_cast<Segment*>(data);
  const auto base = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS && base != 0 && found.inside - base < info->dlpi_phdr[i].p_memsz)
      found.base = base, found.size = info->dlpi_phdr[i].p_memsz;
  return found.base != 0;
}

// The parts of static memory that AddressSanitizer lays between variables are copied too.
__attribute__((no_sanitize("address"), optimize("no-tree-loop-distribute-patterns"))) void copy(char* to,
                                                                                                const char* from,
                                                                                                size_t bytes) {
  struct __attribute__((packed, may_alias)) Line {
    uint64_t words[8];
  };
  for (; bytes >= sizeof(Line); bytes -= sizeof(Line), to += sizeof(Line), from += sizeof(Line))
    *reinterpret_cast<Line*>(to) = *reinterpret_cast<const Line*>(from);
  while (bytes-- > 0) *to++ = *from++;
}

bool before(const Actor& actor, uint32_t time, uint16_t thread) {
  return thread == actor.thread || time < actor.known->warps[thread / 32];
}

}  // namespace

void Shared::begin_launch(size_t dynamic_bytes) {
  dynamic_ = reinterpret_cast<char*>(torchweld::cuda::shared_memory);
  dynamic_size_ = dynamic_bytes;
  first_address_ = 1024 + machine().seed % 64 * 16;
  Segment segment{reinterpret_cast<uintptr_t>(dynamic_), 0, 0};
  dl_iterate_phdr(find_segment, &segment);
  base_ = segment.base;
  size_ = segment.size;
  __asan_unpoison_memory_region(dynamic_, sizeof(torchweld::cuda::shared_memory));
  __asan_poison_memory_region(dynamic_ + dynamic_size_, sizeof(torchweld::cuda::shared_memory) - dynamic_size_);
}

void Shared::begin_block(Memory& memory, uint32_t now, unsigned char poison) {
  // Zeros that take no memory until they are written: most blocks use a small part.
  if (memory.bytes == nullptr) memory.bytes.reset(static_cast<Byte*>(std::calloc(size_, sizeof(Byte))));
  if (memory.bytes == nullptr) throw std::bad_alloc();
  memory.begin = now;
  bytes_ = memory.bytes.get();
  begin_ = now;
  std::memset(dynamic_, poison, dynamic_size_);
}

template <class F>
void Shared::each_part(F&& f) const {
  auto* const before = reinterpret_cast<char*>(base_);
  auto* const beyond = dynamic_ + sizeof(torchweld::cuda::shared_memory);
  f(before, static_cast<size_t>(dynamic_ - before));
  f(dynamic_, dynamic_size_);
  f(beyond, static_cast<size_t>(before + size_ - beyond));
}

void Shared::leave(Memory& memory) {
  memory.aside.resize(size_ - sizeof(torchweld::cuda::shared_memory) + dynamic_size_);
  char* to = memory.aside.data();
  each_part([&](const char* from, size_t bytes) { copy(to, from, bytes), to += bytes; });
}

void Shared::return_to(Memory& memory) {
  bytes_ = memory.bytes.get();
  begin_ = memory.begin;
  const char* from = memory.aside.data();
  each_part([&](char* to, size_t bytes) { copy(to, from, bytes), from += bytes; });
}

void Shared::place(const void* p, char (&text)[64]) const {
  const auto offset = static_cast<const char*>(p) - dynamic_;
  if (offset >= 0 && static_cast<size_t>(offset) < sizeof(torchweld::cuda::shared_memory))
    std::snprintf(text, sizeof(text), "byte %td of shared memory", offset);
  else
    std::snprintf(text, sizeof(text), "static shared memory at %p", p);
}

Shared::Byte* Shared::bytes_of(const void* p, size_t bytes) {
  const auto offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(dynamic_);
  if (offset < sizeof(torchweld::cuda::shared_memory) && offset + bytes > dynamic_size_)
    fail("out of range: %zu bytes at byte %zu of shared memory, of which the launch asked for %zu", bytes,
         static_cast<size_t>(offset), dynamic_size_);
  return &bytes_[reinterpret_cast<uintptr_t>(p) - base_];
}

void Shared::access(const Actor& actor, uint32_t now, const void* p, size_t bytes, Kind kind) {
  Byte* known = bytes_of(p, bytes);
  for (size_t i = 0; i < bytes && kSeesAll; ++i) {
    Byte& b = known[i];
    const bool fresh = b.written >= begin_;
    const auto stop = [&](const char* format, int other) {
      char where[64];
      place(static_cast<const char*>(p) + i, where);
      fail(format, where, other);
    };
    if (!fresh) b.lent = 0;
    if (!fresh && kind != Kind::write) stop("read of poison: nobody has written %s", 0);
    if (fresh && b.in_flight)
      stop("%s is touched before the asynchronous copy of thread %d to it has been waited for", b.writer);
    if (fresh && !(kind == Kind::atomic && b.atomic) && !before(actor, b.written, b.writer))
      stop(kind == Kind::read ? "race: reads %s, which thread %d writes, and nothing orders the two"
                              : "race: writes %s, which thread %d writes too, and nothing orders the two",
           b.writer);
    if (kind != Kind::read && b.lent > 0) stop("%s is written while an asynchronous instruction may still read it", 0);
    if (kind == Kind::read) {
      const auto replaceable = [&](int r) { return b.read[r] < begin_ || before(actor, b.read[r], b.reader[r]); };
      const int r = replaceable(0) ? 0 : replaceable(1) ? 1 : actor.thread & 1;
      b.read[r] = now;
      b.reader[r] = actor.thread;
    } else {
      for (int r = 0; r < 2 && !(kind == Kind::atomic && b.atomic); ++r)
        if (b.read[r] >= begin_ && !before(actor, b.read[r], b.reader[r]))
          stop("race: writes %s, which thread %d reads, and nothing orders the two", b.reader[r]);
      b.written = now;
      b.writer = actor.thread;
      b.atomic = kind == Kind::atomic;
      b.in_flight = b.landed = false;
    }
  }
}

void Shared::depart(const Actor& actor, uint32_t now, void* p, size_t bytes) {
  access(actor, now, p, bytes, Kind::write);
  std::memset(p, 0xff, bytes);
  Byte* known = bytes_of(p, bytes);
  for (size_t i = 0; i < bytes; ++i) known[i].in_flight = true;
}

void Shared::land(uint16_t thread, uint32_t now, void* p, const void* from, size_t bytes, size_t valid, bool seen) {
  Byte* known = bytes_of(p, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    known[i].in_flight = false;
    known[i].landed = seen;
    known[i].written = now;
    known[i].writer = thread;
  }
  std::memcpy(p, from, valid);
  std::memset(static_cast<char*>(p) + valid, 0, bytes - valid);
}

void Shared::lend(const Actor& actor, uint32_t now, const void* p, size_t bytes, const std::vector<uint32_t>& fences) {
  access(actor, now, p, bytes, Kind::read);
  Byte* known = bytes_of(p, bytes);
  for (size_t i = 0; i < bytes && kSeesAll; ++i) {
    const Byte& b = known[i];
    if (!b.landed && fences[b.writer] <= b.written && fences[actor.thread] <= b.written) {
      char where[64];
      place(static_cast<const char*>(p) + i, where);
      fail("an asynchronous instruction reads %s, which thread %d has written: fence.proxy.async belongs between",
           where, b.writer);
    }
    ++known[i].lent;
  }
}

void Shared::give_back(uint16_t thread, uint32_t now, const void* p, size_t bytes) {
  Byte* known = bytes_of(p, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    --known[i].lent;
    known[i].read[0] = now;  // read by the thread that waited for it
    known[i].reader[0] = thread;
  }
}

uint32_t Shared::address(const void* p) const {
  if (!holds(p)) fail("%p is not an address of shared memory", p);
  return first_address_ + static_cast<uint32_t>(static_cast<const char*>(p) - dynamic_);
}

char* Shared::pointer(uint32_t address) const {
  char* p = dynamic_ + static_cast<int32_t>(address - first_address_);
  if (!holds(p)) fail("%u is not an address of shared memory", address);
  return p;
}

}  // namespace emulation
