#include "global.h"

#include <algorithm>
#include <cstdio>

#include "block.h"

namespace emulation {
namespace {

constexpr uint64_t kAtomic = uint64_t{1} << 31, kActor = kAtomic - 1;
constexpr int kWord = 2;                 // the shift of a page whose cells are words
constexpr size_t kMostPages = 1u << 10;  // kept from one launch to the next

uint32_t time_of(uint64_t stamp) { return static_cast<uint32_t>(stamp >> 32); }
uint32_t block_of(uint64_t stamp) { return static_cast<uint32_t>((stamp & kActor) >> 10); }
uint16_t thread_of(uint64_t stamp) { return static_cast<uint16_t>(stamp & 1023); }
bool same_thread(uint64_t a, uint64_t b) { return ((a ^ b) & kActor) == 0; }

[[noreturn]] void stop(const char* what, const void* p, uint64_t other) {
  char whose[96];
  std::snprintf(whose, sizeof(whose), "global memory at %p, which thread %d of block %u", p, thread_of(other),
                block_of(other));
  fail(what, whose);
}

}  // namespace

void Global::begin_launch(uint32_t now) {
  begin_ = uint64_t{now} << 32;
  if (pages_.size() <= kMostPages) return;
  pages_.clear();
  recent_ = {};
}

Global::Page& Global::page_at(uintptr_t number) {
  Page*& recent = recent_[number % kRecent];
  if (recent == nullptr || recent->number != number) {
    recent = &pages_[number];
    recent->number = number;
  }
  Page& page = *recent;
  if (page.begin != begin_) {  // all of its stamps are older than the launch
    page.begin = begin_;
    page.shift = kWord;
    if (page.cells.empty()) page.cells.resize(kPage >> kWord);
  }
  return page;
}

void Global::refine(Page& page, int shift) {
  const int by = page.shift - shift;
  const size_t size = kPage >> shift;
  if (page.cells.size() < size) page.cells.resize(size);
  for (size_t i = size; i-- > 0;) page.cells[i] = page.cells[i >> by];
  page.shift = shift;
}

bool Global::before(const Actor& actor, Stamp stamp) const {
  const uint16_t thread = thread_of(stamp);
  const uint32_t number = block_of(stamp), time = time_of(stamp);
  if (number == block->number && (thread == actor.thread || time < actor.known->warps[thread / kWarp])) return true;
  return knows(actor.known->blocks, number, thread, time) ||
         (actor.learned != nullptr && knows(*actor.learned, number, thread, time));
}

void Global::read(Page& page, Cell& cell, const Actor& actor, Stamp mine) const {
  if (cell.written >= begin_ && !(cell.written & mine & kAtomic) && !before(actor, cell.written))
    stop("race: reads %s writes, and nothing orders the two", page.address(cell), cell.written);
  // Two threads that nothing orders stay known as long as there are two: then one of them is not the next writer.
  const auto free = [&](int r) { return cell.read[r] < begin_ || same_thread(cell.read[r], mine); };
  const int r = free(0) ? 0 : free(1) ? 1 : __builtin_parityll(mine & kActor);
  cell.read[r] = mine;
}

void Global::write(Page& page, Cell& cell, const Actor& actor, Stamp mine) const {
  const auto races = [&](Stamp other) {
    return other >= begin_ && !same_thread(other, mine) && !(other & mine & kAtomic) && !before(actor, other);
  };
  if (races(cell.written))
    stop("race: writes %s writes too, and nothing orders the two", page.address(cell), cell.written);
  for (const Stamp read : cell.read)
    if (races(read)) stop("race: writes %s reads, and nothing orders the two", page.address(cell), read);
  cell.written = mine;
}

template <class F>
void Global::each_run(const void* p, size_t bytes, F&& f) {
  auto at = reinterpret_cast<uintptr_t>(p);
  const int shift = ((at | bytes) & 3) == 0 ? kWord : ((at | bytes) & 1) == 0 ? 1 : 0;
  for (const uintptr_t end = at + bytes; at < end;) {
    Page& page = page_at(at / kPage);
    if (shift < page.shift) refine(page, shift);
    const uintptr_t beyond = std::min(end, (at / kPage + 1) * kPage);
    f(page, &page.cells[at % kPage >> page.shift], &page.cells[(beyond - 1) % kPage >> page.shift]);
    at = beyond;
  }
}

void Global::access(const Actor& actor, const void* p, size_t bytes, Kind kind) {
  const bool atomic = kind == Kind::atomic || kind == Kind::volatile_read || kind == Kind::volatile_write;
  const Stamp mine = uint64_t{Block::now} << 32 | (atomic ? kAtomic : 0) | uint64_t{block->number} << 10 | actor.thread;
  each_run(p, bytes, [&](Page& page, Cell* cell, Cell* last) {
    switch (kind) {
      case Kind::constant:
        for (Cell* c = cell; c <= last; ++c)
          if (c->written >= begin_)
            stop("a non-coherent load reads %s has written in this launch", page.address(*c), c->written);
        [[fallthrough]];
      case Kind::read:
      case Kind::volatile_read:
        for (; cell <= last; ++cell) {
          if (cell->written < begin_ && same_thread(cell->read[0], mine))
            cell->read[0] = mine;
          else
            read(page, *cell, actor, mine);
        }
        break;
      case Kind::write:
      case Kind::volatile_write:
        block->polls = Block::idle = 0;
        [[fallthrough]];
      case Kind::atomic:  // says itself whether it has changed anything
        for (; cell <= last; ++cell) write(page, *cell, actor, mine);
    }
  });
}

void Global::check_unwritten(const void* p, size_t bytes, uint32_t since) {
  each_run(p, bytes, [&](const Page& page, const Cell* cell, const Cell* last) {
    for (; cell <= last; ++cell)
      if (cell->written >= begin_ && time_of(cell->written) > since)
        stop("race: a copy in flight reads %s writes", page.address(*cell), cell->written);
  });
}

}  // namespace emulation
