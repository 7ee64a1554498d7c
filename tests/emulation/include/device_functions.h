// The functions of CUDA that a kernel may call, with the semantics of the CUDA C++ Programming Guide. Section titles
// are those of the guide.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"
#include "vector_types.h"

// Plain variables. The machine sets them before a thread continues. They are const here, so that reading them is no
// checked access.
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// ---- Synchronization functions

inline void __syncthreads(emulation::Place place = emulation::here()) {
  emulation::barrier("__syncthreads", 0, emulation::kWholeBlock, place);
}
inline int __syncthreads_count(int yes, emulation::Place place = emulation::here()) {
  return emulation::barrier("__syncthreads_count", 0, emulation::kWholeBlock, place, yes != 0).count;
}
inline int __syncthreads_and(int yes, emulation::Place place = emulation::here()) {
  return emulation::barrier("__syncthreads_and", 0, emulation::kWholeBlock, place, yes != 0).all;
}
inline int __syncthreads_or(int yes, emulation::Place place = emulation::here()) {
  return emulation::barrier("__syncthreads_or", 0, emulation::kWholeBlock, place, yes != 0).any;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  int nothing = 0;
  emulation::collective("__syncwarp", mask, nothing, [](auto&) {});
}

// ---- Memory fence functions

inline void __threadfence_block() { emulation::fence(emulation::Scope::block); }
inline void __threadfence() { emulation::fence(emulation::Scope::device); }
inline void __threadfence_system() { emulation::fence(emulation::Scope::device); }
inline void __nanosleep(unsigned) { emulation::yield(); }

// ---- Warp shuffle functions

namespace emulation {

template <class T>
struct Shuffle {
  T value, result;
  int from;  // lane
};

template <class T>
T shuffle(const char* name, unsigned mask, T value, int from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle takes 4 or 8 bytes");
  Shuffle<T> mine{value, value, from};
  collective(name, mask, mine, [&](const Lanes<Shuffle<T>>& lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!lanes.has(lane)) continue;
      if (!lanes.has(lanes[lane].from))
        fail("%s: lane %d asks lane %d, which the mask 0x%08x leaves out", name, lane, lanes[lane].from, mask);
      lanes[lane].result = lanes[lanes[lane].from].value;
    }
  });
  return mine.result;
}

}  // namespace emulation

// Lanes in groups of `width`. A lane whose source is outside of its group gets its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = emulation::lane_id(), from = lane ^ lane_mask;
  return emulation::shuffle("__shfl_xor_sync", mask, value, from / width <= lane / width ? from : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulation::lane_id(), from = lane % width + static_cast<int>(delta);
  return emulation::shuffle("__shfl_down_sync", mask, value, from < width ? lane / width * width + from : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulation::lane_id(), from = lane % width - static_cast<int>(delta);
  return emulation::shuffle("__shfl_up_sync", mask, value, from >= 0 ? lane - static_cast<int>(delta) : lane);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulation::lane_id();
  return emulation::shuffle("__shfl_sync", mask, value, lane / width * width + (source & (width - 1)));
}

// ---- Warp vote functions

namespace emulation {

struct Vote {
  bool yes;
  unsigned ballot;
};

inline unsigned ballot(const char* name, unsigned mask, bool yes) {
  Vote mine{yes, 0};
  collective(name, mask, mine, [](const Lanes<Vote>& lanes) {
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes.has(lane) && lanes[lane].yes) ballot |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes.has(lane)) lanes[lane].ballot = ballot;
  });
  return mine.ballot;
}

}  // namespace emulation

inline unsigned __ballot_sync(unsigned mask, int yes) { return emulation::ballot("__ballot_sync", mask, yes != 0); }
inline int __any_sync(unsigned mask, int yes) { return emulation::ballot("__any_sync", mask, yes != 0) != 0; }
inline int __all_sync(unsigned mask, int yes) { return emulation::ballot("__all_sync", mask, yes != 0) == mask; }

// ---- Warp reduce functions

namespace emulation {

template <class T, class F>
T reduce(const char* name, unsigned mask, T value, F&& f) {
  collective(name, mask, value, [&](const Lanes<T>& lanes) {
    T total{};
    bool first = true;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes.has(lane)) total = first ? lanes[lane] : f(total, lanes[lane]), first = false;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes.has(lane)) lanes[lane] = total;
  });
  return value;
}

}  // namespace emulation

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return emulation::reduce("__reduce_add_sync", mask, value, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return emulation::reduce("__reduce_max_sync", mask, value, [](unsigned a, unsigned b) { return std::max(a, b); });
}

// ---- Atomic functions: they return the old value

namespace emulation {

template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic(T* p, F&& f) {
  check_atomic(p, sizeof(T));
  const T before = *p, after = f(before);
  *p = after;
  yield(std::memcmp(&before, &after, sizeof(T)) != 0);
  return before;
}

}  // namespace emulation

template <class T>
T atomicAdd(T* p, T value) {
  return emulation::atomic(p, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* p, T value) {
  return emulation::atomic(p, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicMin(T* p, T value) {
  return emulation::atomic(p, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicExch(T* p, T value) {
  return emulation::atomic(p, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* p, T compare, T value) {
  return emulation::atomic(p, [&](T old) { return old == compare ? value : old; });
}

// ---- Loads and stores with cache hints. The compiler may split them, so alignment is checked here.

namespace emulation {

template <class T>
T* aligned(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) fail("misaligned address: %zu bytes at %p", sizeof(T), p);
  return p;
}

}  // namespace emulation

// The cache of this load does not see what the launch writes.
template <class T>
__attribute__((no_sanitize("thread"))) T __ldg(const T* p) {
  emulation::check_constant(p, sizeof(T));
  return *p;
}
template <class T>
T __ldca(const T* p) {
  return *emulation::aligned(p);
}
template <class T>
T __ldcg(const T* p) {
  return *emulation::aligned(p);
}
template <class T>
T __ldcs(const T* p) {
  return *emulation::aligned(p);
}
template <class T>
void __stwb(T* p, T value) {
  *emulation::aligned(p) = value;
}
template <class T>
void __stcs(T* p, T value) {
  *emulation::aligned(p) = value;
}
template <class T>
void __stcg(T* p, T value) {
  *emulation::aligned(p) = value;
}

// ---- Address space conversion

inline size_t __cvta_generic_to_shared(const void* p) { return emulation::shared_address(p); }

// ---- Mathematical functions and intrinsics: errors are those of the guide's "Mathematical Functions"

using std::max;
using std::min;

namespace emulation {

// x, which the compiler does not contract with what comes after.
inline float rounded(float x) {
  asm("" : "+r"(x));
  return x;
}

}  // namespace emulation

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float rsqrtf(float x) { return emulation::approximate(x, 1 / std::sqrt(double{x}), 2); }
inline float normcdff(float x) { return emulation::approximate(x, 0.5 * std::erfc(x * -0.707106781186547524), 5); }
inline float __expf(float x) {
  return emulation::approximate(x, std::exp(double{x}), 2 + std::floor(std::fabs(1.173 * x)));
}
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsub_rn(float x, float y) { return emulation::rounded(x - y); }
inline float __fmul_rn(float x, float y) { return emulation::rounded(x * y); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fdividef(float x, float y) { return emulation::approximate(x, double{x} / y, 2); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}

// The device's functions of these names, for code of the project: its namespace comes before the global one.
namespace torchweld::cuda {

inline float expf(float x) { return emulation::approximate(x, std::exp(double{x}), 2); }
inline float logf(float x) { return emulation::approximate(x, std::log(double{x}), 1); }
inline float log2f(float x) { return emulation::approximate(x, std::log2(double{x}), 1); }

}  // namespace torchweld::cuda
