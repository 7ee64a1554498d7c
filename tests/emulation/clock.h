// What the threads of a warp know of the accesses of others. Time counts meetings of threads, not instructions.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace emulation {

// Of an access. `constant` is a non-coherent load.
enum class Kind { read, write, atomic, volatile_read, volatile_write, constant };

// What is known of a block by atomic accesses and fences: of each warp, and of single threads, the time before which
// their accesses come first.
struct Seen {
  std::vector<uint32_t> warps;
  std::map<uint16_t, uint32_t> threads;
};
using Others = std::map<uint32_t, Seen>;  // by the number of the block

struct Clock {
  std::vector<uint32_t> warps;  // of the own block, by barriers and collectives
  Others blocks;
};

// into = the later of both.
void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from);
void join(Others& into, const Others& from);
void join(Clock& into, const Clock& from);

// True if `others` knows what this thread of this block did at this time.
bool knows(const Others& others, uint32_t block, uint16_t thread, uint32_t time);

}  // namespace emulation
