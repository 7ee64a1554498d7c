// The machine that stands in for a GPU, as the headers in include/ see it: what a thread of a kernel can ask for.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

// What a test can set.
struct Machine {
  int multiprocessors = 4;
  int shared_bytes_per_block = 232448;  // of a block that has asked for it, as on Hopper
  int capability = 80;                  // 90: wgmma and what goes with it
  unsigned seed = 0;                    // of the schedule; 0: blocks, warps and lanes in rising order
};
Machine& machine();

// Ends the launch with this error, which will name kernel, block, thread and line.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- Running a kernel

struct Launch {
  uint32_t grid[3], block[3], cluster[3];
  size_t dynamic_shared;
};

// Runs `thread` once for every thread of the grid. `kernel` names it in errors.
void run(const Launch& launch, const void* kernel, const std::function<void()>& thread);

// Lets the others run: what a thread must do that waits for what it cannot be woken by.
void yield();

// ---- Warps

bool gather(const char* name, unsigned mask, void* mine, void* (&all)[32]);
void release(unsigned mask);

// The lanes of a collective: operands and results of each, on its own stack; only those of the mask are there.
template <class Lane>
struct Lanes {
  void* pointers[32] = {};
  bool has(int lane) const { return pointers[lane] != nullptr; }
  Lane& operator[](int lane) const { return *static_cast<Lane*>(pointers[lane]); }
};

// What all lanes of `mask` do together: each brings its operands in `mine`; the last to come calls compute(lanes),
// which reads the operands and writes the results of all; then all go on.
template <class Lane, class F>
void collective(const char* name, unsigned mask, Lane& mine, F&& compute) {
  Lanes<Lane> lanes;
  if (!gather(name, mask, &mine, lanes.pointers)) return;
  compute(lanes);
  release(mask);
}

int lane_id();

// As tensor cores round sums (Fasi et al.: Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330).
inline float toward_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// ---- Barriers of a block

struct Votes {
  int count, all, any;  // of the threads at a barrier: how many said yes, and whether all or any did
};

constexpr int kWholeBlock = -1;

// bar.sync id, count: waits until `count` threads have come. All that wait at a barrier must say the same name.
Votes barrier(const char* name, int id, int count, bool yes = false);
// bar.arrive id, count: comes and goes on.
void arrive(const char* name, int id, int count);

// ---- Shared memory

uint32_t shared_address(const void* pointer);  // what the hardware calls it: 32 bits
char* shared_pointer(uint32_t address);

// The checks that compiled code undergoes by itself, for instructions that access memory in bulk: shared memory must be
// the launch's own, written before it is read, and free of races. `alignment` is in bytes.
void check_read(const void* pointer, size_t bytes, size_t alignment);
void check_write(void* pointer, size_t bytes, size_t alignment);
void check_atomic(void* pointer, size_t bytes);

// ---- Asynchronous copies (cp.async): they land when their group is waited for, not before.

void copy_async(void* shared, const void* global, size_t bytes, size_t valid);  // zeros beyond the first `valid` bytes
void commit_copies();
void wait_for_copies(int groups);  // until no more than `groups` of the newest groups are on their way

}  // namespace emulation
