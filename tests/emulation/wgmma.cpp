// wgmma: asynchronous products. Until a product is waited for, its registers hold NaN and may not be touched, and the
// shared memory that it reads may not be written. With a random schedule it reads its operands when it is issued or
// when it is waited for; in order, as late as possible.
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <vector>

#include "async.h"
#include "block.h"
#include "core.h"
#include "descriptor.h"

namespace emulation {

const std::vector<uint32_t>& async_fences();

namespace {

constexpr uint32_t kAll = 0xffffffffu, kPoison = 0xffffffffu;

// One instruction of a warp: 16 rows of the product.
struct Product {
  std::array<WarpgroupProduct, 32> lanes;
  std::vector<uint32_t> lent;  // addresses of the 2-byte elements that it reads
  bool done = false;
};

struct Sums {  // the accumulator of one warp
  std::array<float*, 32> registers;
  std::vector<std::array<float, 32>> values;
};

// The left operand of one warp, in registers, while products in flight use it.
struct LeftOperand {
  std::array<uint32_t*, 32> registers;
  std::array<std::array<uint32_t, 4>, 32> words;
  int products = 0;
};

struct State {
  std::deque<std::deque<Product>> groups;
  std::deque<Product> open;
  std::vector<Sums> sums;
  std::deque<LeftOperand> left_operands;
  bool fenced = false;
  uint32_t fenced_at = 0;
  int64_t issued = 0;
};
core::PerBlock<std::vector<State>> states;  // of the warps

Sums& sums_of(State& state, const Product& product) {
  for (Sums& sums : state.sums)
    if (sums.registers[0] == product.lanes[0].accumulator) return sums;
  fail("wgmma: an accumulator was lost");
}

LeftOperand& left_of(State& state, const Product& product) {
  for (LeftOperand& left : state.left_operands)
    if (left.registers[0] == product.lanes[0].a_registers) return left;
  fail("wgmma: a left operand was lost");
}

Thread& thread_of(int warp, int lane) { return *block->threads[warp * 32 + lane]; }

void compute(State& state, Product& product, int warp) {
  const WarpgroupProduct& shape = product.lanes[0];
  const Descriptor a(shape.a), b(shape.b);
  const auto element = [&](uint32_t address) {
    uint16_t bits;
    std::memcpy(&bits, shared_pointer(address), 2);
    return static_cast<double>(shape.number(bits));
  };
  std::vector<std::array<double, 16>> right(shape.n);
  for (int column = 0; column < shape.n; ++column)
    for (int k = 0; k < 16; ++k) right[column][k] = element(b.at(column, k, shape.b_transposed));
  const bool a_in_registers = shape.a_registers != nullptr;
  const LeftOperand* operand = a_in_registers ? &left_of(state, product) : nullptr;
  std::array<std::array<double, 16>, 16> left;
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) {
      // In the layout of A in mma.m16n8k16: word k / 8 * 2 + row / 8 of lane row % 8 * 4 + k % 8 / 2.
      const uint32_t word = a_in_registers ? operand->words[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8] : 0;
      left[row][k] = a_in_registers ? shape.number(static_cast<uint16_t>(word >> k % 2 * 16))
                                    : element(a.at(warp % 4 * 16 + row, k, shape.a_transposed));
    }
  Sums& sums = sums_of(state, product);
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < shape.n / 2; ++e) {
      const int row = lane / 4 + e % 4 / 2 * 8, column = e / 4 * 8 + lane % 4 * 2 + e % 2;
      double total = shape.accumulate ? sums.values[e][lane] : 0.0;
      for (int k = 0; k < 16; ++k) total += left[row][k] * right[column][k];
      sums.values[e][lane] = toward_zero(total);
    }
  product.done = true;
}

// Lends the memory that the instruction may read: B, and this warp's rows of A.
void lend(Product& product, int warp) {
  const WarpgroupProduct& shape = product.lanes[0];
  const bool a_in_registers = shape.a_registers != nullptr;
  const Descriptor a(shape.a), b(shape.b);
  b.check_alignment(shape.b_transposed);
  if (!a_in_registers) a.check_alignment(shape.a_transposed);
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16 && !a_in_registers; ++row)
      product.lent.push_back(a.at(warp % 4 * 16 + row, k, shape.a_transposed));
    for (int column = 0; column < shape.n; ++column) product.lent.push_back(b.at(column, k, shape.b_transposed));
  }
  const Actor actor = core::actor();
  const std::vector<uint32_t>& fences = async_fences();
  for (const uint32_t address : product.lent) shared.lend(actor, core::time(), shared_pointer(address), 2, fences);
}

// Fails if a lane has used registers since the last wgmma.fence. Lends them to products.
void take(const State& state, int warp, int lane, void* registers, size_t bytes) {
  Registers& own = thread_of(warp, lane).registers;
  if (own.touched_since(registers, bytes, state.fenced_at))
    fail("wgmma.mma_async: wgmma.fence belongs between the use of its registers and this");
  own.lend(registers, bytes);
}

void take_accumulator(State& state, const Product& product, int warp) {
  for (const Sums& sums : state.sums)
    if (sums.registers[0] == product.lanes[0].accumulator) return;
  const int elements = product.lanes[0].n / 2;
  Sums sums{{}, std::vector<std::array<float, 32>>(elements)};
  for (int lane = 0; lane < 32; ++lane) {
    sums.registers[lane] = product.lanes[lane].accumulator;
    take(state, warp, lane, sums.registers[lane], elements * sizeof(float));
    for (int e = 0; e < elements; ++e) {
      sums.values[e][lane] = sums.registers[lane][e];
      sums.registers[lane][e] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  state.sums.push_back(std::move(sums));
}

void take_left(State& state, const Product& product, int warp) {
  if (product.lanes[0].a_registers == nullptr) return;
  for (LeftOperand& left : state.left_operands)
    if (left.registers[0] == product.lanes[0].a_registers) return void(++left.products);
  LeftOperand left;
  for (int lane = 0; lane < 32; ++lane) {
    left.registers[lane] = product.lanes[lane].a_registers;
    take(state, warp, lane, left.registers[lane], sizeof(left.words[lane]));
    for (int w = 0; w < 4; ++w) {
      left.words[lane][w] = left.registers[lane][w];
      left.registers[lane][w] = kPoison;
    }
  }
  left.products = 1;
  state.left_operands.push_back(left);
}

void give_back_left(State& state, const Product& product, int warp) {
  if (product.lanes[0].a_registers == nullptr) return;
  LeftOperand& left = left_of(state, product);
  if (--left.products > 0) return;
  for (int lane = 0; lane < 32; ++lane) {
    for (int w = 0; w < 4; ++w) {
      if (left.registers[lane][w] != kPoison)
        fail("wgmma.wait_group: lane %d has written word %d of a left operand in flight", lane, w);
      left.registers[lane][w] = left.words[lane][w];
    }
    thread_of(warp, lane).registers.give_back(left.registers[lane]);
  }
  state.left_operands.erase(state.left_operands.begin() + (&left - &state.left_operands[0]));
}

void finish(State& state, Product& product, int warp) {
  if (!product.done) compute(state, product, warp);
  give_back_left(state, product, warp);
  for (const uint32_t address : product.lent)
    shared.give_back(static_cast<uint16_t>(core::thread()), core::time(), shared_pointer(address), 2);
}

// Calls f(state, warp) once for the running warp, when all of its lanes have arrived.
template <class F>
void once(const char* name, Place place, F&& f) {
  int nothing = 0;
  const int warp = core::thread() / 32;
  collective(name, kAll, nothing, [&](const auto&) { f((*states)[warp], warp); }, place);
}

}  // namespace

namespace core {

void begin_products() { states->assign((threads() + 31) / 32, State{}); }

void end_products() {
  const std::vector<State>& states = *emulation::states;
  for (size_t w = 0; w < states.size(); ++w) {
    if (!states[w].open.empty() || !states[w].groups.empty())
      fail("the block has ended while products of warp %zu are not waited for", w);
    if (states[w].issued != states[w / 4 * 4].issued)
      fail("wgmma: warp %zu has issued %lld products, warp %zu of its warpgroup %lld", w,
           static_cast<long long>(states[w].issued), w / 4 * 4, static_cast<long long>(states[w / 4 * 4].issued));
  }
}

}  // namespace core

void wgmma_fence(Place place) {
  once("wgmma.fence", place, [](State& state, int warp) {
    state.fenced = true;
    state.fenced_at = core::tick();
    for (int lane = 0; lane < 32; ++lane) thread_of(warp, lane).registers.watch();
  });
}

void wgmma(const WarpgroupProduct& mine, Place place) {
  WarpgroupProduct brought = mine;
  const int warp = core::thread() / 32;
  collective(
      "wgmma.mma_async", kAll, brought,
      [&](const Lanes<WarpgroupProduct>& lanes) {
        State& state = (*states)[warp];
        if (states->size() % 4 != 0) fail("wgmma: the block is not made of warpgroups");
        if (!state.fenced) fail("wgmma.mma_async: wgmma.fence belongs between the use of its registers and this");
        Product product;
        for (int lane = 0; lane < 32; ++lane) {
          product.lanes[lane] = lanes[lane];
          if (lanes[lane].b != lanes[0].b || lanes[lane].a != lanes[0].a)
            fail("wgmma.mma_async: lanes 0 and %d have different descriptors", lane);
        }
        take_accumulator(state, product, warp);
        take_left(state, product, warp);
        lend(product, warp);
        if (core::random() % 2 == 1 && (state.open.empty() || state.open.back().done) && state.groups.empty())
          compute(state, product, warp);
        state.open.push_back(std::move(product));
        ++state.issued;
      },
      place);
}

void wgmma_commit(Place place) {
  once("wgmma.commit_group", place, [](State& state, int) {
    state.groups.push_back(std::move(state.open));
    state.open.clear();
  });
}

void wgmma_wait(int newest, Place place) {
  once("wgmma.wait_group", place, [&](State& state, int warp) {
    for (; state.groups.size() > static_cast<size_t>(newest); state.groups.pop_front())
      for (Product& product : state.groups.front()) finish(state, product, warp);
    // Releases the registers that no product uses any more.
    const auto in_use = [&](const Sums& sums) {
      const auto uses = [&](const std::deque<Product>& products) {
        for (const Product& product : products)
          if (product.lanes[0].accumulator == sums.registers[0]) return true;
        return false;
      };
      bool used = uses(state.open);
      for (const auto& group : state.groups) used = used || uses(group);
      return used;
    };
    for (size_t i = 0; i < state.sums.size();) {
      Sums& sums = state.sums[i];
      if (in_use(sums)) {
        ++i;
        continue;
      }
      for (int lane = 0; lane < 32; ++lane) {
        thread_of(warp, lane).registers.give_back(sums.registers[lane]);
        for (size_t e = 0; e < sums.values.size(); ++e) sums.registers[lane][e] = sums.values[e][lane];
      }
      state.sums.erase(state.sums.begin() + static_cast<ptrdiff_t>(i));
    }
    if (state.sums.empty()) state.fenced = false;
  });
}

}  // namespace emulation
