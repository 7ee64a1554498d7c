// wgmma: asynchronous products. Until a product is waited for, its accumulator holds NaN and the shared memory that it
// reads may not be written. With a random schedule it reads its operands when it is issued or when it is waited for; in
// order, as late as possible.
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <vector>

#include "async.h"
#include "core.h"

namespace emulation {

const std::vector<uint32_t>& async_fences();

namespace {

constexpr uint32_t kAll = 0xffffffffu;

// "Matrix Descriptor Format"
struct Descriptor {
  uint32_t start, leading, stride;
  int swizzle;  // bytes, 0: none

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        swizzle(std::array{0, 128, 64, 32}[bits >> 62]) {
    if ((bits >> 49 & 7) != 0) fail("wgmma: the machine does not know matrices with a base offset");
  }

  // Shared address of element (i, k), two bytes each. i counts the rows of A or the columns of B: "Canonical Layouts".
  uint32_t at(uint32_t i, uint32_t k, bool transposed) const {
    const uint32_t width = swizzle == 0 ? 16 : swizzle;  // bytes of a row of the swizzle's atom
    uint32_t offset;
    if (!transposed) {
      offset = i / 8 * stride + i % 8 * width + (swizzle == 0 ? k * 2 / 16 * leading + k * 2 % 16 : k * 2);
    } else if (swizzle == 0) {
      offset = i / 8 * stride + i % 8 * 2 + k / 8 * leading + k % 8 * 16;
    } else {
      offset = i * 2 / width * leading + i * 2 % width + k / 8 * stride + k % 8 * width;
    }
    const uint32_t address = start + offset;
    return swizzle == 0 ? address : address ^ ((address >> 7 & (width / 16 - 1)) << 4);
  }
};

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

struct State {
  std::deque<std::deque<Product>> groups;
  std::deque<Product> open;
  std::vector<Sums> sums;
  bool fenced = false;
  int64_t issued = 0;
  int registers = 0;
};
std::vector<State> states;  // of the warps

Sums& sums_of(State& state, const Product& product) {
  for (Sums& sums : state.sums)
    if (sums.registers[0] == product.lanes[0].accumulator) return sums;
  fail("wgmma: an accumulator was lost");
}

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
  std::array<std::array<double, 16>, 16> left;
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k) {
      // In the layout of A in mma.m16n8k16: word k / 8 * 2 + row / 8 of lane row % 8 * 4 + k % 8 / 2.
      const uint32_t word = product.lanes[row % 8 * 4 + k % 8 / 2].a_registers[k / 8 * 2 + row / 8];
      left[row][k] = shape.a_in_registers ? shape.number(static_cast<uint16_t>(word >> k % 2 * 16))
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
  const Descriptor a(shape.a), b(shape.b);
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16 && !shape.a_in_registers; ++row)
      product.lent.push_back(a.at(warp % 4 * 16 + row, k, shape.a_transposed));
    for (int column = 0; column < shape.n; ++column) product.lent.push_back(b.at(column, k, shape.b_transposed));
  }
  for (const uint32_t address : product.lent)
    shared.lend(core::actor(), core::time(), shared_pointer(address), 2, async_fences());
}

void finish(State& state, Product& product, int warp) {
  if (!product.done) compute(state, product, warp);
  for (const uint32_t address : product.lent)
    shared.give_back(static_cast<uint16_t>(core::thread()), core::time(), shared_pointer(address), 2);
}

// Calls f(state, warp) once for the running warp, when all of its lanes have arrived.
template <class F>
void once(const char* name, F&& f) {
  int nothing = 0;
  const int warp = core::thread() / 32;
  collective(name, kAll, nothing, [&](const auto&) { f(states[warp], warp); });
}

}  // namespace

namespace core {

void begin_products() { states.assign((threads() + 31) / 32, State{}); }

void end_products() {
  for (size_t w = 0; w < states.size(); ++w) {
    if (!states[w].open.empty() || !states[w].groups.empty())
      fail("the block has ended while products of warp %zu are not waited for", w);
    if (states[w].issued != states[w / 4 * 4].issued)
      fail("wgmma: warp %zu has issued %lld products, warp %zu of its warpgroup %lld", w,
           static_cast<long long>(states[w].issued), w / 4 * 4, static_cast<long long>(states[w / 4 * 4].issued));
  }
}

}  // namespace core

void wgmma_fence() {
  once("wgmma.fence", [](State& state, int) { state.fenced = true; });
}

void wgmma(const WarpgroupProduct& mine) {
  WarpgroupProduct brought = mine;
  const int warp = core::thread() / 32;
  collective("wgmma.mma_async", kAll, brought, [&](const Lanes<WarpgroupProduct>& lanes) {
    State& state = states[warp];
    if (states.size() % 4 != 0) fail("wgmma: the block is not made of warpgroups");
    if (!state.fenced) fail("wgmma.mma_async: wgmma.fence belongs between the use of its registers and this");
    Product product;
    for (int lane = 0; lane < 32; ++lane) {
      product.lanes[lane] = lanes[lane];
      if (lanes[lane].b != lanes[0].b || (!mine.a_in_registers && lanes[lane].a != lanes[0].a))
        fail("wgmma.mma_async: lanes 0 and %d have different descriptors", lane);
    }
    bool known = false;
    for (const Sums& sums : state.sums) known = known || sums.registers[0] == product.lanes[0].accumulator;
    if (!known) {
      Sums sums{{}, std::vector<std::array<float, 32>>(mine.n / 2)};
      for (int lane = 0; lane < 32; ++lane) {
        sums.registers[lane] = product.lanes[lane].accumulator;
        for (int e = 0; e < mine.n / 2; ++e) {
          sums.values[e][lane] = sums.registers[lane][e];
          sums.registers[lane][e] = std::numeric_limits<float>::quiet_NaN();
        }
      }
      state.sums.push_back(std::move(sums));
    }
    lend(product, warp);
    if (core::random() % 2 == 1 && (state.open.empty() || state.open.back().done) && state.groups.empty())
      compute(state, product, warp);
    state.open.push_back(std::move(product));
    ++state.issued;
  });
}

void wgmma_commit() {
  once("wgmma.commit_group", [](State& state, int) {
    state.groups.push_back(std::move(state.open));
    state.open.clear();
  });
}

void wgmma_wait(int newest) {
  once("wgmma.wait_group", [&](State& state, int warp) {
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
      for (int lane = 0; lane < 32; ++lane)
        for (size_t e = 0; e < sums.values.size(); ++e) sums.registers[lane][e] = sums.values[e][lane];
      state.sums.erase(state.sums.begin() + static_cast<ptrdiff_t>(i));
    }
    if (state.sums.empty()) state.fenced = false;
  });
}

void set_max_registers(int count, bool increase) {
  once("setmaxnreg", [&](State& state, int warp) {
    if (count < 24 || count > 256 || count % 8 != 0)
      fail("setmaxnreg: %d registers, which must be 24 to 256 by 8", count);
    if (state.registers != 0 && (increase ? count < state.registers : count > state.registers))
      fail("setmaxnreg.%s: from %d registers to %d", increase ? "inc" : "dec", state.registers, count);
    state.registers = count;
    int64_t total = 0;
    for (const State& each : states) total += each.registers * 32;
    if (total > 65536) fail("setmaxnreg: warp %d is the one with which the block has more than 65536 registers", warp);
  });
}

}  // namespace emulation
