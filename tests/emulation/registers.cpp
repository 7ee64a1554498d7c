#include "registers.h"

#include <algorithm>
#include <new>

#include "machine.h"

namespace emulation {

void Registers::begin(const Fiber& fiber) {
  stack_ = reinterpret_cast<uintptr_t>(fiber.stack());
  watched_ = false;
  lent_.clear();
}

void Registers::watch() {
  watched_ = true;
  if (times_ != nullptr) return;
  // Zeros that take no memory until they are written: a thread uses the top of its stack only.
  times_.reset(static_cast<uint32_t*>(std::calloc(Fiber::size() / 4, sizeof(uint32_t))));
  if (times_ == nullptr) throw std::bad_alloc();
}

void Registers::record(const void* p, size_t bytes, uint32_t now) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  for (const Lent& lent : lent_)
    if (begin < lent.end && lent.begin < begin + bytes)
      fail("a register of a wgmma in flight is touched: wgmma.wait_group belongs before");
  const size_t first = (begin - stack_) / 4, end = std::min(begin - stack_ + bytes, Fiber::size());
  for (size_t word = first; word * 4 < end; ++word) times_[word] = now;
}

bool Registers::touched_since(const void* p, size_t bytes, uint32_t time) const {
  const uintptr_t first = reinterpret_cast<uintptr_t>(p) - stack_;
  if (first >= Fiber::size()) return false;
  return std::any_of(&times_[first / 4], &times_[(first + bytes) / 4], [&](uint32_t last) { return last >= time; });
}

void Registers::lend(const void* p, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  lent_.push_back({begin, begin + bytes});
}

void Registers::give_back(const void* p) {
  const auto begin = reinterpret_cast<uintptr_t>(p);
  lent_.erase(std::find_if(lent_.begin(), lent_.end(), [&](const Lent& lent) { return lent.begin == begin; }));
}

}  // namespace emulation
