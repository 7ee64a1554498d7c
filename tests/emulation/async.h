// What Hopper does on its own while threads go on: barriers in shared memory that count bytes, bulk copies, products of
// warpgroups. The sections are those of the PTX ISA.
#pragma once

#include <cstdint>
#include <vector>

namespace emulation {

// ---- Parallel Synchronization and Communication Instructions: mbarrier

void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_expect(uint32_t address, uint32_t bytes);
void mbarrier_arrive(uint32_t address);
bool mbarrier_test(uint32_t address, uint32_t parity);  // whether the phase of this parity is over
void mbarrier_wait(uint32_t address, uint32_t parity);  // until it is

void fence_async();  // fence.proxy.async: what this thread has written and learned of is seen by the asynchronous

// ---- Data Movement and Conversion Instructions: cp.async.bulk

// A piece of a copy: neighbouring bytes on both sides. `global` is null where a tensor ends: zeros are read there, and
// nothing is written.
struct Piece {
  uint32_t shared;
  void* global;
  uint32_t bytes;
};
enum class Reduction { none, add_float, add_bfloat16 };

void bulk_load(std::vector<Piece> pieces, uint32_t mbarrier);
void bulk_store(std::vector<Piece> pieces, Reduction reduction);
void bulk_commit();
void bulk_wait(int groups);  // until no more than so many of the newest groups of stores are on their way

// The pieces of the box of a tensor map at these coordinates, the innermost first, at `shared`.
std::vector<Piece> box(const void* tensor_map, const int32_t* coordinates, uint32_t shared);
Reduction box_sum(const void* tensor_map);  // of its type

std::vector<Piece> neighbours(uint32_t shared, void* global, uint32_t bytes);

// ---- Asynchronous Warpgroup Level Matrix Instructions: wgmma

// What one lane brings to wgmma.mma_async.m64nNk16: its part of the accumulator, and of A where that is in registers.
struct WarpgroupProduct {
  float* accumulator;  // [N / 8][4]
  int n;
  bool accumulate;
  bool a_in_registers, a_transposed, b_transposed;
  uint32_t a_registers[4];
  uint64_t a, b;                   // descriptors
  float (*number)(uint16_t bits);  // of the element type
};

void wgmma_fence();
void wgmma(const WarpgroupProduct& product);
void wgmma_commit();
void wgmma_wait(int groups);
void set_max_registers(int count, bool increase);

}  // namespace emulation
