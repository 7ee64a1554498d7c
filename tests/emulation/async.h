// The asynchronous instructions of Hopper: barriers in shared memory that count bytes, bulk copies, products of
// warpgroups. Section titles are those of the PTX ISA.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.h"

namespace emulation {

// ---- Parallel Synchronization and Communication Instructions: mbarrier

void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_expect(uint32_t address, uint32_t bytes);
void mbarrier_arrive(uint32_t address);
bool mbarrier_test(uint32_t address, uint32_t parity);  // true if the phase of this parity is over
void mbarrier_wait(uint32_t address, uint32_t parity);  // waits until it is over

void fence_async();  // fence.proxy.async: asynchronous instructions see what this thread has written and learned

// ---- Data Movement and Conversion Instructions: cp.async.bulk

// A piece of a copy: neighbouring bytes on both sides. Beyond the edge of a tensor `global` is null: zeros are read
// there, and nothing is written.
struct Piece {
  uint32_t shared;
  void* global;
  uint32_t bytes;
};
enum class Reduction { none, add_float, add_bfloat16 };

void bulk_load(std::vector<Piece> pieces, uint32_t mbarrier);
void bulk_store(std::vector<Piece> pieces, Reduction reduction);
void bulk_commit();
void bulk_wait(int groups);  // waits until at most `groups` of the newest groups of stores are in flight

// The pieces of a tensor map's box at these coordinates (innermost first), and at `shared`.
std::vector<Piece> box(const void* tensor_map, const int32_t* coordinates, uint32_t shared);
Reduction box_sum(const void* tensor_map);  // the sum for the map's element type

std::vector<Piece> neighbours(uint32_t shared, void* global, uint32_t bytes);

// ---- Asynchronous Warpgroup Level Matrix Instructions: wgmma

// The operands of one lane of wgmma.mma_async.m64nNk16: its part of the accumulator, and of A where A is in registers.
struct WarpgroupProduct {
  float* accumulator;     // [N / 8][4]
  uint32_t* a_registers;  // [4]; nullptr: A is in shared memory
  int n;
  bool accumulate, a_transposed, b_transposed;
  uint64_t a, b;                   // descriptors
  float (*number)(uint16_t bits);  // converts an element to a float
};

// The fields of a descriptor hold 14 bits, in units of 16 bytes.
void check_descriptor(uint32_t start, uint32_t leading, uint32_t stride);
void wgmma_fence(Place place);
void wgmma(const WarpgroupProduct& product, Place place);
void wgmma_commit(Place place);
void wgmma_wait(int groups, Place place);

// ---- Miscellaneous Instructions: setmaxnreg

void set_max_registers(int count, bool increase, Place place);

}  // namespace emulation
