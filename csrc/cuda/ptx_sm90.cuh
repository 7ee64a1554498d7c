// Instructions of sm_90a: one function each. Quoted names are sections of the PTX ISA. Shared memory is addressed by
// 32-bit byte addresses. tests/emulation/include/cuda/ptx_sm90.cuh replaces this file on a CPU.
#pragma once

#include <cuda.h>

#include "cuda/common.cuh"

namespace torchweld::cuda::ptx {

// ---- Named barriers: "bar, barrier". A block has 16. `threads`: how many take part, a multiple of 32.

__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Barriers in shared memory: "mbarrier". A phase ends when `count` threads and all expected bytes have arrived.

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Between the initialisation and the first asynchronous use of the barrier.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// True if the phase of this parity is over. May wait for a while.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t over;
  asm volatile(
      "{\n.reg .pred over;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
      "selp.u32 %0, 1, 0, over;\n}"
      : "=r"(over)
      : "r"(barrier), "r"(parity)
      : "memory");
  return over != 0;
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// ---- "membar/fence": asynchronous instructions (bulk copies, wgmma) that follow see what this thread has written.

__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- "cp.async.bulk.tensor": copies the box of a tensor map at the coordinates, innermost first. Outside of the
// tensor zeros are read and nothing is written. Loads complete at an mbarrier, stores in a group.

__device__ __forceinline__ void prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The three copies of one rank. load, store: the operand numbers of the coordinates.
#define TORCHWELD_TENSOR_COPIES(rank, load, store)                                                                   \
  __device__ __forceinline__ void tensor_load(uint32_t to, const CUtensorMap* map, uint32_t barrier,                 \
                                              TORCHWELD_PARAMETERS_##rank) {                                         \
    asm volatile("cp.async.bulk.tensor." #rank                                                                       \
                 "d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" load "}], [%2];" ::"r"(to),    \
                 "l"(map), "r"(barrier), TORCHWELD_COORDINATES_##rank                                                \
                 : "memory");                                                                                        \
  }                                                                                                                  \
  __device__ __forceinline__ void tensor_store(const CUtensorMap* map, uint32_t from, TORCHWELD_PARAMETERS_##rank) { \
    asm volatile("cp.async.bulk.tensor." #rank "d.global.shared::cta.tile.bulk_group [%0, {" store                   \
                 "}], [%1];" ::"l"(map),                                                                             \
                 "r"(from), TORCHWELD_COORDINATES_##rank                                                             \
                 : "memory");                                                                                        \
  }                                                                                                                  \
  __device__ __forceinline__ void tensor_add(const CUtensorMap* map, uint32_t from, TORCHWELD_PARAMETERS_##rank) {   \
    asm volatile("cp.reduce.async.bulk.tensor." #rank "d.global.shared::cta.add.tile.bulk_group [%0, {" store        \
                 "}], [%1];" ::"l"(map),                                                                             \
                 "r"(from), TORCHWELD_COORDINATES_##rank                                                             \
                 : "memory");                                                                                        \
  }
#define TORCHWELD_PARAMETERS_2 int c0, int c1
#define TORCHWELD_PARAMETERS_3 TORCHWELD_PARAMETERS_2, int c2
#define TORCHWELD_PARAMETERS_4 TORCHWELD_PARAMETERS_3, int c3
#define TORCHWELD_COORDINATES_2 "r"(c0), "r"(c1)
#define TORCHWELD_COORDINATES_3 TORCHWELD_COORDINATES_2, "r"(c2)
#define TORCHWELD_COORDINATES_4 TORCHWELD_COORDINATES_3, "r"(c3)
TORCHWELD_TENSOR_COPIES(2, "%3, %4", "%2, %3")
TORCHWELD_TENSOR_COPIES(3, "%3, %4, %5", "%2, %3, %4")
TORCHWELD_TENSOR_COPIES(4, "%3, %4, %5, %6", "%2, %3, %4, %5")
#undef TORCHWELD_COORDINATES_4
#undef TORCHWELD_COORDINATES_3
#undef TORCHWELD_COORDINATES_2
#undef TORCHWELD_PARAMETERS_4
#undef TORCHWELD_PARAMETERS_3
#undef TORCHWELD_PARAMETERS_2
#undef TORCHWELD_TENSOR_COPIES

// ---- "cp.async.bulk", "cp.reduce.async.bulk": neighbouring bytes, a multiple of 16 on both sides.

__device__ __forceinline__ void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_add(float* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

// Ends a group of this thread's stores.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but the last kPending groups have read shared memory, which may then be overwritten; or have
// finished.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- "setmaxnreg": registers per thread of the warpgroup, 24 to 256, a multiple of 8.

template <int kRegisters>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- "wgmma": products of a warpgroup, 64 rows by N columns by 16, of 16-bit numbers, in fp32.

enum class Swizzle : uint64_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

// "Matrix Descriptor Format". leading, stride: in bytes, see "Strides". leading is ignored for swizzled K-major rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t start, uint32_t leading, uint32_t stride, Swizzle swizzle) {
  return static_cast<uint64_t>(swizzle) << 62 | static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 |
         static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 | (start >> 4 & 0x3fff);
}

// Between other uses of a product's registers and its first instruction.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last kPending groups are complete. Until then their registers may not be touched.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The registers of c: their operand numbers in PTX, and as operands of asm.
#define TORCHWELD_LIST_64                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TORCHWELD_LIST_128                                                           \
  TORCHWELD_LIST_64                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TORCHWELD_LIST_256                                                                       \
  TORCHWELD_LIST_128                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define TORCHWELD_TILE(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define TORCHWELD_TILES(j) TORCHWELD_TILE(j), TORCHWELD_TILE(j + 1), TORCHWELD_TILE(j + 2), TORCHWELD_TILE(j + 3)
#define TORCHWELD_OPERANDS_64 TORCHWELD_TILES(0), TORCHWELD_TILES(4)
#define TORCHWELD_OPERANDS_128 TORCHWELD_OPERANDS_64, TORCHWELD_TILES(8), TORCHWELD_TILES(12)
#define TORCHWELD_OPERANDS_256 \
  TORCHWELD_OPERANDS_128, TORCHWELD_TILES(16), TORCHWELD_TILES(20), TORCHWELD_TILES(24), TORCHWELD_TILES(28)
// The instruction for N columns and one element type. `scale`: the operand number of the flag "accumulate"; `operands`
// and the arguments after it: all operands but c.
#define TORCHWELD_WGMMA_OF(N, type, scale, operands, ...)                                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " scale                                                              \
               ", 0;\n"                                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" TORCHWELD_LIST_##N "}, " operands \
                                                                                                       ";\n}"         \
               : TORCHWELD_OPERANDS_##N                                                                               \
               : __VA_ARGS__)
#define TORCHWELD_WGMMA(columns, scale, operands, ...)                 \
  if constexpr (N == columns && std::is_same_v<T, __nv_bfloat16>)      \
    TORCHWELD_WGMMA_OF(columns, "bf16", scale, operands, __VA_ARGS__); \
  else if constexpr (N == columns)                                     \
  TORCHWELD_WGMMA_OF(columns, "f16", scale, operands, __VA_ARGS__)

// c = a @ b, or c += a @ b with `accumulate`. Lane 4 * g + t of warp w holds c[j][e]: row 16 * w + g (+ 8 if e > 1),
// column 8 * j + 2 * t (+ 1 if e is odd). kTransposed: the operand is not K-major. a and b are descriptors here.
template <class T, int N, bool kTransposedA = false, bool kTransposedB = false>
__device__ __forceinline__ void wgmma(float (&c)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 256, "a product has 64, 128 or 256 columns");
#define TORCHWELD_INPUTS "l"(a), "l"(b), "r"(int{accumulate}), "n"(int{kTransposedA}), "n"(int{kTransposedB})
  TORCHWELD_WGMMA(64, "%34", "%32, %33, p, 1, 1, %35, %36", TORCHWELD_INPUTS);
  TORCHWELD_WGMMA(128, "%66", "%64, %65, p, 1, 1, %67, %68", TORCHWELD_INPUTS);
  TORCHWELD_WGMMA(256, "%130", "%128, %129, p, 1, 1, %131, %132", TORCHWELD_INPUTS);
#undef TORCHWELD_INPUTS
}

// The same with a in registers: 16 x 16 per warp, in the layout of mma.m16n8k16.
template <class T, int N, bool kTransposedB = false>
__device__ __forceinline__ void wgmma(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 256, "a product has 64, 128 or 256 columns");
#define TORCHWELD_INPUTS \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}), "n"(int{kTransposedB})
  TORCHWELD_WGMMA(64, "%37", "{%32, %33, %34, %35}, %36, p, 1, 1, %38", TORCHWELD_INPUTS);
  TORCHWELD_WGMMA(128, "%69", "{%64, %65, %66, %67}, %68, p, 1, 1, %70", TORCHWELD_INPUTS);
  TORCHWELD_WGMMA(256, "%133", "{%128, %129, %130, %131}, %132, p, 1, 1, %134", TORCHWELD_INPUTS);
#undef TORCHWELD_INPUTS
}

#undef TORCHWELD_WGMMA
#undef TORCHWELD_WGMMA_OF
#undef TORCHWELD_OPERANDS_256
#undef TORCHWELD_OPERANDS_128
#undef TORCHWELD_OPERANDS_64
#undef TORCHWELD_TILES
#undef TORCHWELD_TILE
#undef TORCHWELD_LIST_256
#undef TORCHWELD_LIST_128
#undef TORCHWELD_LIST_64

}  // namespace torchweld::cuda::ptx
