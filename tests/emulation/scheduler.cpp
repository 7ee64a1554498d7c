// Runs a kernel on the CPU. Each thread of a block is a fiber, which suspends itself at every barrier and collective
// until all of its block or warp have arrived. Several blocks are in flight, and one of them runs. Which block runs how
// long, which of its warps next, and in which order the lanes, is drawn from the seed.
#include <algorithm>
#include <cstdlib>
#include <numeric>
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
  block->current->done = true;
  block->own_warp().ready &= ~(1u << block->current->lane);
  --block->alive;
  block->suspend();
}

void run_thread(Thread& thread) {
  block->current = &thread;
  threadIdx = {thread.index.x, thread.index.y, thread.index.z};
  thread.fiber.enter();
  block->current = nullptr;
  if (!failure.message.empty()) throw std::runtime_error(failure.message);
}

// Runs every lane that is ready until it waits.
void run_warp(int w) {
  const unsigned first = core::random();
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned lane = (first & 32 ? ~i : i) + first & (kWarp - 1);
    if (block->warps[w].ready >> lane & 1) run_thread(*block->threads[w * kWarp + lane]);
  }
}

// A warp with a lane that is ready; -1: none. In order it is the first one, and the next if that polls.
int choose_warp() {
  const int count = static_cast<int>(block->warps.size());
  const int first =
      (machine().seed == 0 ? block->polls / (2 * kWarp) : static_cast<int>(random_numbers() >> 1)) % count;
  for (int i = 0; i < count; ++i)
    if (block->warps[(first + i) % count].ready != 0) return (first + i) % count;
  return -1;
}

// Runs one warp of the block, or lets a copy arrive.
void step() {
  int warp = choose_warp();
  if (core::land(warp < 0)) return;
  if (warp < 0) {  // wakes one thread, which reports the deadlock
    block->deadlocked = true;
    for (int t = 0; t < block->size && warp < 0; ++t)
      if (!block->threads[t]->done) block->wake(*block->threads[t]), warp = block->threads[t]->warp;
  }
  run_warp(warp);
}

// The blocks of a launch: those in flight, and the order in which the others start.
class Grid {
 public:
  explicit Grid(const Launch& launch)
      : launch_(launch),
        blocks_(uint64_t{gridDim.x} * gridDim.y * gridDim.z),
        threads_(launch.block[0] * launch.block[1] * launch.block[2]) {
    if (blocks_ > kMostBlocks)
      fail("a grid of %llu blocks, of which the machine knows at most %llu", static_cast<unsigned long long>(blocks_),
           static_cast<unsigned long long>(kMostBlocks));
    if (machine().seed == 0) return;
    resident_ = std::min<size_t>(2 + random_numbers() % 3, fitting());
    mean_turn_ = 1u << random_numbers() % 8;
    first_ = random_numbers() % blocks_;
    stride_ = 1 + random_numbers() % blocks_;
    while (std::gcd(stride_, blocks_) != 1) ++stride_;
  }

  void run() {
    while (next()) {
      take_turn();
      if (block->alive > 0) continue;
      core::end_block();
      in_flight_.erase(std::find(in_flight_.begin(), in_flight_.end(), block));
    }
  }

 private:
  // Each thread of the block has let others run several times, and nothing has come of it.
  static bool only_polls(int polls) { return polls > 4 * block->alive; }

  // Runs the block: in order until it ends or only polls, else for some steps.
  void take_turn() const {
    const bool in_order = machine().seed == 0;
    int before = block->polls;
    for (uint64_t left = 1 + core::random() % (2 * mean_turn_); block->alive > 0 && left > 0; left -= !in_order) {
      step();
      before = std::min(before, block->polls);
      if (only_polls(block->polls - before)) break;
    }
  }

  // As many blocks as the multiprocessors of Hopper would run at once, but for their registers.
  size_t fitting() const {
    const size_t threads = (threads_ + kWarp - 1) / kWarp * kWarp, shared = launch_.dynamic_shared + 1024;
    const size_t each = std::min<size_t>({32, 2048 / threads, 233472 / shared});
    return std::min(std::max<size_t>(each, 1) * machine().multiprocessors, 8192 / threads);
  }

  // The block that runs next, a new one or one in flight. False if all have ended.
  bool next() {
    const bool stuck = !in_flight_.empty() && block->alive > 0 && only_polls(block->polls);  // others must come first
    const bool more = started_ < blocks_, room = in_flight_.size() < (stuck ? fitting() : resident_);
    const size_t one = core::random() % resident_;
    if (more && room && (stuck || one >= in_flight_.size())) return start(), true;
    if (in_flight_.empty()) return false;
    switch_to(in_flight_[(stuck || machine().seed == 0 ? ++turns_ : random_numbers()) % in_flight_.size()]);
    return true;
  }

  void switch_to(Block* to) {
    if (to == block) return;
    leave();
    block = to;
    shared.return_to(block->memory);
    show_index();
  }

  void start() {
    leave();
    block = free_one();
    in_flight_.push_back(block);
    block->begin(static_cast<uint32_t>((first_ + started_++ * stride_) % blocks_), launch_.block, entry);
    shared.begin_block(block->memory, Block::now, 0xff);
    core::begin_block();
    show_index();
  }

  void leave() const {
    if (std::find(in_flight_.begin(), in_flight_.end(), block) != in_flight_.end()) shared.leave(block->memory);
  }

  static void show_index() {
    const uint32_t b = block->number;
    blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
  }

  Block* free_one() const {
    static std::vector<std::unique_ptr<Block>> all;
    for (const auto& each : all)
      if (std::find(in_flight_.begin(), in_flight_.end(), each.get()) == in_flight_.end()) return each.get();
    all.push_back(std::make_unique<Block>(all.size()));
    return all.back().get();
  }

  const Launch& launch_;
  const uint64_t blocks_;
  const size_t threads_;
  size_t resident_ = 1;                            // how many are in flight, unless they only poll
  uint64_t mean_turn_ = 1;                         // in steps
  uint64_t first_ = 0, stride_ = 1, started_ = 0;  // the order of blocks
  size_t turns_ = 0;                               // of blocks that come one after the other
  std::vector<Block*> in_flight_;
};

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
  blockDim = {launch.block[0], launch.block[1], launch.block[2]};
  gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
  blockIdx = {};
  random_numbers.seed(machine().seed);
  shared.begin_launch(launch.dynamic_shared);
  global.begin_launch(++Block::now);
  released.begin_launch();
  try {
    Grid(launch).run();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(place_of(failure, kernel, {blockIdx.x, blockIdx.y, blockIdx.z}) + error.what());
  }
}

void yield(bool changed) {
  constexpr int kForEver = 100000;
  static uint32_t last = 0;
  if (Block::now != last) Block::idle = 0, last = Block::now;
  if (!changed) ++block->polls;
  if (++Block::idle > kForEver) fail("waits for ever: every thread that can run only polls");
  block->suspend();
}

}  // namespace emulation
