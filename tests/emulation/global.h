// Global memory: for each word that a launch touches, the last writer, two readers, and when they accessed it. Of two
// accesses one comes first if the same thread made them, or if a barrier, a collective, or fences and atomic accesses
// (fences.h) lie between. If neither comes first and one of them is a write, that is a race, in whichever order they
// ran. Atomic accesses do not race with each other. A launch comes after all that was before it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "clock.h"

namespace emulation {

class Global {
 public:
  void begin_launch(uint32_t now);

  // The thread of the block that runs, and what it knows. `learned` may be null.
  struct Actor {
    uint16_t thread;
    const Clock* known;
    const Others* learned;
  };
  void access(const Actor& actor, const void* p, size_t bytes, Kind kind);

  // Fails if something has written the bytes since: a copy that was issued then may have read the old or the new ones.
  void check_unwritten(const void* p, size_t bytes, uint32_t since);

 private:
  // From the highest bit: the time (32 bits), whether the access was atomic, the block (21 bits), the thread (10 bits).
  using Stamp = uint64_t;
  struct Cell {
    Stamp written = 0, read[2] = {};
  };
  static constexpr size_t kPage = 4096, kRecent = 256;
  // 4 KB of memory. Where a launch accesses halves of words or single bytes, they have cells of their own.
  struct Page {
    uintptr_t number = 0;
    Stamp begin = 0;  // of the launch that has used it last
    int shift = 0;    // a cell is of 1 << shift bytes
    std::vector<Cell> cells;

    const void* address(const Cell& cell) const {
      return reinterpret_cast<const void*>(number * kPage + (static_cast<size_t>(&cell - cells.data()) << shift));
    }
  };

  // f(page, first, last) of the cells of these bytes.
  template <class F>
  void each_run(const void* p, size_t bytes, F&& f);
  Page& page_at(uintptr_t number);
  static void refine(Page& page, int shift);
  bool before(const Actor& actor, Stamp stamp) const;
  void read(Page& page, Cell& cell, const Actor& actor, Stamp mine) const;
  void write(Page& page, Cell& cell, const Actor& actor, Stamp mine) const;

  Stamp begin_ = 0;
  std::unordered_map<uintptr_t, Page> pages_;
  std::array<Page*, kRecent> recent_ = {};  // by the low bits of the number
};

constexpr uint64_t kMostBlocks = uint64_t{1} << 21;  // that a stamp can tell apart

}  // namespace emulation
