// The machine that stands in for a GPU, as the headers in include/ see it: what a thread of a kernel can call.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

// The properties that a test can set.
struct Machine {
  int multiprocessors = 4;
  int shared_bytes_per_block = 232448;  // the limit after cudaFuncSetAttribute, as on Hopper
  int capability = 80;                  // 90 has wgmma and the rest of async.h
  unsigned seed = 0;                    // of the schedule; 0: blocks, warps and lanes in rising order
  unsigned rounding = 0;                // of the errors of approximate instructions; 0: results are rounded once
};
Machine& machine();

// Ends the launch with this error, to which the machine adds kernel, block, thread and lines.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- Running a kernel

struct Launch {
  uint32_t grid[3], block[3], cluster[3];
  size_t dynamic_shared;
};

// Runs `thread` once for every thread of the grid. Errors name `kernel`.
void run(const Launch& launch, const void* kernel, const std::function<void()>& thread);

// Lets other threads run. A thread that polls memory must call this. `changed`: it has written another value since.
void yield(bool changed = false);

// ---- Warps

// Where a kernel's source calls an instruction. All lanes of a warp must be at the same place for one that is
// `.aligned`.
struct Place {
  const char* file = nullptr;  // nullptr: an instruction that lanes may call at different places
  int line = 0;
};
// As the default argument of a wrapper of an instruction: the place that calls the wrapper.
inline Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
// Fails unless both places are the same, or one of them is any.
void meet(const char* name, const Place& here, const Place& there);

bool gather(const char* name, unsigned mask, void* mine, void* (&all)[32], Place place);
void release(unsigned mask);

// The operands and results of a collective, each on its lane's stack. Lanes outside the mask are missing.
template <class Lane>
struct Lanes {
  void* pointers[32] = {};
  bool has(int lane) const { return pointers[lane] != nullptr; }
  Lane& operator[](int lane) const { return *static_cast<Lane*>(pointers[lane]); }
};

// Runs one step that all lanes of `mask` do together. Each lane brings its operands in `mine`. The last lane to arrive
// calls compute(lanes), which reads the operands and writes the results of all lanes. Then all lanes continue.
template <class Lane, class F>
void collective(const char* name, unsigned mask, Lane& mine, F&& compute, Place place = {}) {
  Lanes<Lane> lanes;
  if (!gather(name, mask, &mine, lanes.pointers, place)) return;
  compute(lanes);
  release(mask);
}

int lane_id();

// Rounds a sum as tensor cores do (Fasi et al.: Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science
// 7:e330).
inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// What an approximate instruction gives for x, whose exact result is `exact`: at most `ulps` away, where the seed of
// Machine::rounding decides. The same x has the same result.
float approximate(float x, double exact, double ulps);

// ---- Barriers of a block

struct Votes {
  int count, all, any;  // the threads that voted yes: how many, whether all, whether any
};

constexpr int kWholeBlock = -1;

// bar.sync id, count: waits until `count` threads have arrived. All threads that wait at a barrier give the same name.
Votes barrier(const char* name, int id, int count, Place place, bool yes = false);
// bar.arrive id, count: arrives without waiting.
void arrive(const char* name, int id, int count, Place place);

// ---- Shared memory

uint32_t shared_address(const void* pointer);  // the 32-bit address of the hardware
char* shared_pointer(uint32_t address);

// The checks of an access, for instructions that access memory in bulk (compiled accesses are checked automatically).
// Shared memory must belong to the launch and be written before it is read; all memory must be free of races.
// `alignment` is in bytes.
void check_read(const void* pointer, size_t bytes, size_t alignment);
void check_constant(const void* pointer, size_t bytes);  // ld.global.nc: nothing writes it during the launch
void check_write(void* pointer, size_t bytes, size_t alignment);
void check_atomic(void* pointer, size_t bytes);

// A memory fence: atomic accesses after it release what came before it; what atomic accesses before it have acquired
// comes before all that follows. To threads of the own block, or to all.
enum class Scope { block, device };
void fence(Scope scope);

// ---- Asynchronous copies (cp.async): they arrive when their group is waited for, not before.

void copy_async(void* shared, const void* global, size_t bytes, size_t valid);  // zeros after the first `valid` bytes
void commit_copies();
void wait_for_copies(int groups);  // waits until at most `groups` of the newest groups are in flight

}  // namespace emulation
