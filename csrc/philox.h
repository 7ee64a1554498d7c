// Random bits by counting: Philox4x32-10 of Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011.
//
// A dropout mask is a matrix; element (row, col) is dropped where word col % 4 of philox(seed, row, col / 4) is below a
// threshold. So forward and backward, the CPU and the GPU, and any tiling or number of threads see the same mask, and
// nothing but the seed is ever stored. reference/philox.py is the definition in PyTorch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
  #define TW_HOST_DEVICE __host__ __device__ __forceinline__
#else
  #define TW_HOST_DEVICE inline
#endif

namespace torchweld {

// What a kernel needs to know of a dropout. drop is 0: none.
struct Dropout {
  const int64_t* seed;   // [], on the device of the kernel; nullptr: no dropout
  uint32_t drop;         // an element is dropped where its word is below this
  float scale;           // of those that are kept: 1 / (1 - p), or 0 where p is 1
  int64_t first_column;  // of the mask, for column 0 here; a multiple of 64
};

// p in [0, 1].
inline Dropout make_dropout(const int64_t* seed, double p, int64_t first_column = 0) {
  constexpr double kWords = 4294967296.0;
  const double drop = p * kWords + 0.5;
  return {seed, drop >= kWords ? 0xffffffffu : static_cast<uint32_t>(drop),
          p < 1 ? static_cast<float>(1 / (1 - p)) : 0.0f, first_column};
}

namespace philox {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

struct Words {
  uint32_t word[4];
};

// The four words of columns 4 * block to 4 * block + 3 of a row.
TW_HOST_DEVICE Words words(uint64_t seed, uint64_t row, uint32_t block) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = block, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  for (int round = 0; round < kRounds; ++round, key0 += kWeyl0, key1 += kWeyl1) {
    const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * c0,
                   product1 = static_cast<uint64_t>(kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace philox
}  // namespace torchweld
