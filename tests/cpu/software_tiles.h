// AMX's tiles in software: the amx kernels, built with this header in front, run on any CPU with AVX-512 BF16. Sums are
// in the order of Intel's Architecture Instruction Set Extensions Programming Reference, chapter 3. Slow.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace software_tiles {

struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// One thread's. Palette 0: the tiles are not configured, and their use is an error.
struct Tiles {
  Config config;
  alignas(64) uint8_t data[8][16][64];

  int rows(int tile) const {
    if (config.palette != 1) std::abort();
    return config.rows[tile];
  }
};
inline thread_local Tiles tiles{};

inline void load_config(const void* config) {
  std::memset(&tiles, 0, sizeof tiles);
  std::memcpy(&tiles.config, config, sizeof tiles.config);
}
inline void store_config(void* config) { std::memcpy(config, &tiles.config, sizeof tiles.config); }
inline void release() { std::memset(&tiles, 0, sizeof tiles); }

inline void zero(int tile) {
  tiles.rows(tile);
  std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}
inline void load(int tile, const void* memory, int64_t stride) {
  zero(tile);
  for (int r = 0; r < tiles.rows(tile); ++r)
    std::memcpy(tiles.data[tile][r], static_cast<const char*>(memory) + r * stride, tiles.config.row_bytes[tile]);
}
inline void store(int tile, void* memory, int64_t stride) {
  for (int r = 0; r < tiles.rows(tile); ++r)
    std::memcpy(static_cast<char*>(memory) + r * stride, tiles.data[tile][r], tiles.config.row_bytes[tile]);
}

// TDPBF16PS: of a row of `a` and a column of `b`, the even and the odd elements have a sum each.
inline void multiply(int sum, int a, int b) {
  const auto even_of = [](__m512i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)); };
  const auto odd_of = [](__m512i words) {
    return _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-0x10000)));
  };
  for (int m = 0; m < tiles.rows(sum); ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < tiles.config.row_bytes[a] / 4; ++k) {
      int32_t word;
      std::memcpy(&word, &tiles.data[a][m][4 * k], sizeof word);
      const __m512i left = _mm512_set1_epi32(word), right = _mm512_load_si512(tiles.data[b][k]);
      even = _mm512_fmadd_ps(even_of(left), even_of(right), even);
      odd = _mm512_fmadd_ps(odd_of(left), odd_of(right), odd);
    }
    uint8_t* row = tiles.data[sum][m];
    _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_add_ps(even, odd)));
  }
}

}  // namespace software_tiles

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig software_tiles::load_config
#define _tile_storeconfig software_tiles::store_config
#define _tile_release software_tiles::release
#define _tile_zero software_tiles::zero
#define _tile_loadd software_tiles::load
#define _tile_stored software_tiles::store
#define _tile_dpbf16ps software_tiles::multiply
