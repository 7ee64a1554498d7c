// Runs a kernel on the CPU, one block after the other. Each thread of a block is a fiber, which suspends itself at
// every barrier and collective until all of its block or warp have arrived. Which warp runs next, and in which order
// its lanes, is drawn from the seed.
#include <algorithm>
#include <cstdlib>
#include <random>
#include <stdexcept>

#include "block.h"
#include "core.h"
#include "failure.h"

struct uint3 {
  unsigned x, y, z;
};
uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

std::mt19937 random_numbers;
const std::function<void()>* program = nullptr;  // what each thread runs

void entry() {
  Fiber::began();
  (*program)();
  block.current->done = true;
  block.own_warp().ready &= ~(1u << block.current->lane);
  --block.alive;
  block.suspend();
}

void run_thread(Thread& thread) {
  block.current = &thread;
  threadIdx = {thread.index.x, thread.index.y, thread.index.z};
  thread.fiber.enter();
  block.current = nullptr;
  if (!failure.message.empty()) throw std::runtime_error(failure.message);
}

// Runs every lane that is ready until it waits.
void run_warp(int w) {
  const unsigned first = core::random();
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned lane = (first & 32 ? ~i : i) + first & (kWarp - 1);
    if (block.warps[w].ready >> lane & 1) run_thread(*block.threads[w * kWarp + lane]);
  }
}

// A warp with a lane that is ready; -1: none.
int choose_warp() {
  const int count = static_cast<int>(block.warps.size());
  const int first = machine().seed == 0 ? 0 : static_cast<int>(random_numbers() % count);
  for (int i = 0; i < count; ++i)
    if (block.warps[(first + i) % count].ready != 0) return (first + i) % count;
  return -1;
}

void run_block(const Launch& launch) {
  block.begin(launch.block, entry);
  shared.begin_block(block.now, 0xff);
  core::begin_block();
  while (block.alive > 0) {
    int warp = choose_warp();
    if (core::land(warp < 0)) continue;
    if (warp < 0) {  // wakes one thread, which reports the deadlock
      block.deadlocked = true;
      for (int t = 0; t < block.size && warp < 0; ++t)
        if (!block.threads[t]->done) block.wake(*block.threads[t]), warp = block.threads[t]->warp;
    }
    run_warp(warp);
  }
  core::end_block();
}

}  // namespace

uint32_t core::random() { return machine().seed == 0 ? 0 : random_numbers(); }

Machine& machine() {
  static Machine value = [] {
    Machine machine;
    const auto number = [](const char* name) -> unsigned {
      const char* text = std::getenv(name);
      return text != nullptr ? std::strtoul(text, nullptr, 10) : 0;
    };
    machine.seed = number("TORCHWELD_EMULATION_SEED");
    machine.rounding = number("TORCHWELD_EMULATION_ROUNDING");
    return machine;
  }();
  return value;
}

void run(const Launch& launch, const void* kernel, const std::function<void()>& thread) {
  failure = {};
  failure.trace.take();  // loads what a trace needs, outside of any signal
  const Signals signals;
  program = &thread;
  block.deadlocked = false;
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  random_numbers.seed(machine().seed);
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  const uint64_t first = machine().seed == 0 ? 0 : random_numbers() % std::max<uint64_t>(blocks, 1);
  shared.begin_launch(launch.dynamic_shared);
  try {
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t b = (first + i) % blocks;
      blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
                  static_cast<unsigned>(b / gridDim.x / gridDim.y)};
      run_block(launch);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(place_of(failure, kernel, {blockIdx.x, blockIdx.y, blockIdx.z}) + error.what());
  }
}

void yield() {
  constexpr int kForEver = 100000;
  static uint32_t last = 0;
  static int count = 0;
  if (block.now != last) count = 0, last = block.now;
  if (++count > kForEver) fail("waits for ever: every thread of the block that can run only polls");
  block.suspend();
}

}  // namespace emulation
