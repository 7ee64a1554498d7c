// setmaxnreg: the registers that the warps of a block take from its pool and give back to it.
#include <algorithm>
#include <vector>

#include "async.h"
#include "core.h"

namespace emulation {
namespace {

constexpr int kRegisterFile = 65536, kLanes = 32, kMost = 256;
constexpr unsigned kAll = 0xffffffffu;

struct Pool {
  std::vector<int> registers;  // per thread of each warp
  std::vector<int> waiting;    // threads that wait for more
  int free = 0;
  bool used = false;
};
core::PerBlock<Pool> pool;

// True if the warp now has `count` registers per thread.
bool adjust(int warp, int count, bool increase) {
  int& registers = pool->registers[warp];
  if (count < 24 || count > kMost || count % 8 != 0)
    fail("setmaxnreg: %d registers, which must be 24 to 256 by 8", count);
  if (increase ? count < registers : count > registers)
    fail("setmaxnreg.%s: from %d registers to %d", increase ? "inc" : "dec", registers, count);
  const int more = (count - registers) * kLanes;
  if (more > pool->free) return false;
  pool->free -= more;
  pool->used = true;
  registers = count;
  for (const int thread : pool->waiting) core::wake(thread);
  pool->waiting.clear();
  return true;
}

}  // namespace

namespace core {

// At entry every thread has as many registers as its launch bounds leave to it, which the compiler counts by 8.
void begin_registers() {
  const int warps = (threads() + kLanes - 1) / kLanes, each = kRegisterFile / (warps * kLanes) / 8 * 8;
  *pool = {};
  pool->registers.assign(warps, std::min(each, kMost));
}

void end_registers() {
  const auto& all = pool->registers;
  for (size_t w = 0; w < all.size() && pool->used; ++w)
    if (all[w] != all[w / 4 * 4])
      fail("setmaxnreg: warp %zu has %d registers, warp %zu of its warpgroup %d", w, all[w], w / 4 * 4, all[w / 4 * 4]);
}

}  // namespace core

void set_max_registers(int count, bool increase, Place place) {
  const int warp = core::thread() / kLanes;
  for (bool done = false; !done;) {
    while (increase && (count - pool->registers[warp]) * kLanes > pool->free) {
      pool->waiting.push_back(core::thread());
      core::wait("setmaxnreg.inc");
    }
    collective(
        "setmaxnreg", kAll, done,
        [&](const Lanes<bool>& lanes) {
          const bool enough = adjust(warp, count, increase);
          for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = enough;
        },
        place);
  }
}

}  // namespace emulation
