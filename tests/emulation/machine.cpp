// Runs a kernel on the CPU: a fiber for each thread of a block, which gives way at every barrier and collective until
// all of its block or warp have come there; the blocks one after the other. Which warp goes on, and in which order its
// lanes, is drawn from the seed.
#include "machine.h"

#include <signal.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "core.h"
#include "fiber.h"
#include "report.h"
#include "shared.h"

struct uint3 {
  unsigned x, y, z;
};
uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Shared shared;

namespace {

constexpr int kWarp = 32, kNamedBarriers = 16;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int id, lane, warp;
  bool done;
  const char* waits_at;
  Votes votes;
  std::vector<Copy> copies;                 // not committed
  std::deque<std::vector<Copy>> in_flight;  // groups, the oldest first
};

// The lanes of one mask, on their way to a collective.
struct Gathering {
  const char* name;
  unsigned mask, arrived = 0;
  void* lanes[kWarp];
};

struct Warp {
  unsigned ready, waiting;  // lanes that can go on; lanes at a collective
  Clock known;
  Gathering gatherings[kWarp];  // by the lowest lane of the mask
};

struct Barrier {
  const char* name;
  int arrived = 0, expected = 0, yes = 0;
  Clock brought;
  std::vector<Thread*> waiting;
};

std::vector<std::unique_ptr<Thread>> all_threads;  // kept for their stacks
std::vector<Warp> warps;
Barrier barriers[kNamedBarriers];
int alive = 0, size = 0;  // threads of the block
Thread* current = nullptr;
uint32_t now = 1;
std::mt19937 random_numbers;
bool doomed = false;  // whoever waits has no hope
std::string failure;
Trace failure_trace;
const Thread* failed = nullptr;
const std::function<void()>* program = nullptr;

Warp& own_warp() { return warps[current->warp]; }
void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void give_way() { current->fiber.leave(); }

void wake(Thread& thread) { warps[thread.warp].ready |= 1u << thread.lane; }

}  // namespace

namespace core {

int thread() { return current->id; }
int threads() { return size; }
Actor actor() { return {static_cast<uint16_t>(current->id), &own_warp().known}; }
uint32_t time() { return now; }
uint32_t tick() { return ++now; }
void learn(int thread, const Clock& clock) { join(warps[thread / kWarp].known, clock); }
void wake(int thread) { emulation::wake(*emulation::all_threads[thread]); }
uint32_t random() { return machine().seed == 0 ? 0 : random_numbers(); }

void wait(const char* name) {
  current->waits_at = name;
  own_warp().ready &= ~(1u << current->lane);
  give_way();
  if (doomed) {
    int waiting = 0;
    for (int t = 0; t < size; ++t) waiting += !all_threads[t]->done;
    fail("waits for ever at %s: of the %d threads of the block %d wait and %d have ended", name, size, waiting,
         size - alive);
  }
  current->waits_at = nullptr;
}

}  // namespace core

namespace {

using core::actor;
using core::wait;

void entry() {
  Fiber::began();
  (*program)();
  current->done = true;
  own_warp().ready &= ~(1u << current->lane);
  --alive;
  give_way();
}

// ---- The schedule

void run_thread(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  thread.fiber.enter();
  current = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

// Every lane that is ready goes on until it has to wait.
void run_warp(int w) {
  const unsigned first = machine().seed == 0 ? 0 : random_numbers();
  for (unsigned i = 0; i < kWarp; ++i) {
    const unsigned lane = (first & 32 ? ~i : i) + first & (kWarp - 1);
    if (warps[w].ready >> lane & 1) run_thread(*all_threads[w * kWarp + lane]);
  }
}

int choose_warp() {
  const int count = static_cast<int>(warps.size());
  const int first = machine().seed == 0 ? 0 : static_cast<int>(random_numbers() % count);
  for (int i = 0; i < count; ++i)
    if (warps[(first + i) % count].ready != 0) return (first + i) % count;
  return -1;
}

void run_block(const Launch& launch) {
  size = static_cast<int>(launch.block[0] * launch.block[1] * launch.block[2]);
  alive = size;
  ++now;
  const Clock start((size + kWarp - 1) / kWarp, now);
  warps.assign(start.size(), Warp{0, 0, start, {}});
  for (Barrier& barrier : barriers) barrier = Barrier{};
  while (all_threads.size() < static_cast<size_t>(size)) all_threads.push_back(std::make_unique<Thread>());
  for (int t = 0; t < size; ++t) {
    Thread& thread = *all_threads[t];
    const auto x = static_cast<unsigned>(t), bx = launch.block[0], by = launch.block[1];
    thread.index = {x % bx, x / bx % by, x / (bx * by)};
    thread.id = t;
    thread.lane = t % kWarp;
    thread.warp = t / kWarp;
    thread.done = false;
    thread.waits_at = nullptr;
    thread.copies.clear();
    thread.in_flight.clear();
    thread.fiber.prepare(entry);
    wake(thread);
  }
  shared.begin_block(now, 0xff);
  core::begin_block();
  while (alive > 0) {
    int warp = choose_warp();
    if (core::land(warp < 0)) continue;
    if (warp < 0) {
      doomed = true;
      for (int t = 0; t < size && warp < 0; ++t)
        if (!all_threads[t]->done) wake(*all_threads[t]), warp = all_threads[t]->warp;
    }
    run_warp(warp);
  }
  core::end_block();
}

// ---- Failures

struct Signals {  // a wild pointer of a kernel is an error like any other
  static constexpr int kCaught[] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction before[3];
  stack_t stack_before;

  static void caught(int number, siginfo_t* info, void*) {
    if (current == nullptr) {  // not a kernel's
      signal(number, SIG_DFL);
      return;
    }
    fail(number == SIGFPE ? "arithmetic error at %p" : "invalid address %p", info->si_addr);
  }

  Signals() {
    static char memory[64 * 1024];
    const stack_t stack{memory, 0, sizeof(memory)};
    sigaltstack(&stack, &stack_before);
    struct sigaction action{};
    action.sa_sigaction = caught;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; ++i) sigaction(kCaught[i], &action, &before[i]);
  }
  ~Signals() {
    for (int i = 0; i < 3; ++i) sigaction(kCaught[i], &before[i], nullptr);
    sigaltstack(&stack_before, nullptr);
  }
};

std::string where(const void* kernel, const Thread* thread) {
  const auto triple = [](const uint3& v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  std::string text = "[" + function_name(kernel) + "] block " + triple(blockIdx);
  if (thread != nullptr) text += " thread " + triple(thread->index) + ", " + source_lines(failure_trace);
  return text + ": ";
}

}  // namespace

Machine& machine() {
  static Machine value = [] {
    Machine machine;
    if (const char* seed = std::getenv("TORCHWELD_EMULATION_SEED")) machine.seed = std::strtoul(seed, nullptr, 10);
    return machine;
  }();
  return value;
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  if (current == nullptr) throw std::runtime_error(text);
  failure = text;
  failed = current;
  failure_trace.take();
  give_way();
  std::abort();  // nobody goes back to a thread that has failed
}

void run(const Launch& launch, const void* kernel, const std::function<void()>& thread) {
  failure_trace.take();  // loads what a trace needs, outside of any signal
  const Signals signals;
  program = &thread;
  failure.clear();
  failed = nullptr;
  doomed = false;
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
    throw std::runtime_error(where(kernel, failed) + error.what());
  }
}

void yield() {
  constexpr int kForEver = 100000;
  static uint32_t last = 0;
  static int count = 0;
  if (now != last) count = 0, last = now;
  if (++count > kForEver)
    fail("waits for ever: nothing happens any more in the block but threads that look for a change");
  give_way();
}

// ---- Warps

int lane_id() { return current->lane; }

bool gather(const char* name, unsigned mask, void* mine, void* (&all)[32]) {
  Warp& warp = own_warp();
  const unsigned me = 1u << current->lane;
  if ((mask & me) == 0) fail("%s: mask 0x%08x leaves out lane %d, which calls it", name, mask, current->lane);
  Gathering& here = warp.gatherings[__builtin_ctz(mask)];
  if (here.arrived == 0) {
    here.name = name;
    here.mask = mask;
    if ((warp.waiting & mask) != 0)
      for (Gathering& other : warp.gatherings)
        if ((other.arrived & mask) != 0)
          fail("lanes of one warp are at different collectives: %s with mask 0x%08x here, %s with mask 0x%08x there",
               name, mask, other.name, other.mask);
  } else if (here.mask != mask || std::strcmp(here.name, name) != 0) {
    fail("lanes of one warp are at different collectives: %s with mask 0x%08x here, %s with mask 0x%08x there", name,
         mask, here.name, here.mask);
  }
  here.lanes[current->lane] = mine;
  here.arrived |= me;
  if (here.arrived != mask) {
    warp.waiting |= me;
    wait(name);
    return false;
  }
  for (int lane = 0; lane < kWarp; ++lane) all[lane] = mask >> lane & 1 ? here.lanes[lane] : nullptr;
  return true;
}

void release(unsigned mask) {
  Warp& warp = own_warp();
  warp.gatherings[__builtin_ctz(mask)].arrived = 0;
  warp.waiting &= ~mask;
  warp.ready |= mask;
  warp.known[current->warp] = ++now;
}

// ---- Barriers

namespace {

Barrier& come(const char* name, int id, int count, bool yes) {
  if (id < 0 || id >= kNamedBarriers) fail("%s: barrier %d, of which there are 16", name, id);
  const int expected = count == kWholeBlock ? size : count;
  if (count != kWholeBlock && (count <= 0 || count % kWarp != 0))
    fail("%s: barrier %d for %d threads, which are not whole warps", name, id, count);
  Barrier& here = barriers[id];
  if (here.arrived == 0) {
    here.name = name;
    here.expected = expected;
    here.brought.assign(warps.size(), 0);
    here.yes = 0;
  }
  if (here.expected != expected)
    fail("%s: barrier %d for %d threads here, for %d there", name, id, expected, here.expected);
  ++now;
  join(here.brought, own_warp().known);
  here.brought[current->warp] = std::max(here.brought[current->warp], now);
  here.yes += yes;
  ++here.arrived;
  return here;
}

// All have come: those that wait go on.
void open(Barrier& here) {
  const Votes votes{here.yes, here.yes == here.expected, here.yes > 0};
  ++now;
  for (Thread* thread : here.waiting) {
    thread->votes = votes;
    join(warps[thread->warp].known, here.brought);
    wake(*thread);
  }
  here.waiting.clear();
  here.arrived = 0;
}

}  // namespace

Votes barrier(const char* name, int id, int count, bool yes) {
  Barrier& here = come(name, id, count, yes);
  if (!here.waiting.empty() && std::strcmp(here.waiting[0]->waits_at, name) != 0)
    fail("threads of one block are at different barriers: %s here, %s there", name, here.waiting[0]->waits_at);
  here.waiting.push_back(current);
  if (here.arrived == here.expected)
    open(here);
  else
    wait(name);
  return current->votes;
}

void arrive(const char* name, int id, int count) {
  Barrier& here = come(name, id, count, false);
  if (here.arrived == here.expected) open(here);
}

// ---- Memory

uint32_t shared_address(const void* pointer) { return shared.address(pointer); }
char* shared_pointer(uint32_t address) { return shared.pointer(address); }

void access(const void* p, size_t bytes, size_t alignment, Kind kind) {
  if (current == nullptr) return;
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail("misaligned address: %zu bytes at %p", bytes, p);
  if (shared.holds(p)) shared.access(actor(), now, p, bytes, kind);
}

void check_read(const void* pointer, size_t bytes, size_t alignment) { access(pointer, bytes, alignment, Kind::read); }
void check_write(void* pointer, size_t bytes, size_t alignment) { access(pointer, bytes, alignment, Kind::write); }
void check_atomic(void* pointer, size_t bytes) { access(pointer, bytes, bytes, Kind::atomic); }

void copy_async(void* to, const void* from, size_t bytes, size_t valid) {
  if (!shared.holds(to)) fail("cp.async: %p is not in shared memory", to);
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0) fail("cp.async: misaligned address: %zu bytes at %p", bytes, to);
  if (reinterpret_cast<uintptr_t>(from) % bytes != 0)
    fail("cp.async: misaligned address: %zu bytes from %p", bytes, from);
  shared.depart(actor(), now, to, bytes);
  current->copies.push_back({to, from, bytes, valid});
}

void commit_copies() {
  current->in_flight.push_back(std::move(current->copies));
  current->copies.clear();
}

void wait_for_copies(int groups) {
  for (; current->in_flight.size() > static_cast<size_t>(groups); current->in_flight.pop_front())
    for (const Copy& copy : current->in_flight.front())
      shared.land(static_cast<uint16_t>(current->id), now, copy.to, copy.from, copy.bytes, copy.valid, false);
}

}  // namespace emulation

// ---- The calls that -fsanitize=thread puts before every access of a kernel

#define TORCHWELD_ACCESS(bytes)                                                                              \
  extern "C" void __tsan_read##bytes(void* p) { emulation::access(p, bytes, bytes, emulation::Kind::read); } \
  extern "C" void __tsan_write##bytes(void* p) { emulation::access(p, bytes, bytes, emulation::Kind::write); }
TORCHWELD_ACCESS(1)
TORCHWELD_ACCESS(2)
TORCHWELD_ACCESS(4)
TORCHWELD_ACCESS(8)
TORCHWELD_ACCESS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { emulation::access(p, bytes, 1, emulation::Kind::read); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { emulation::access(p, bytes, 1, emulation::Kind::write); }
extern "C" void __tsan_init() {}
