// Tensor maps. cuTensorMapEncodeTiled refuses what the reference of the CUDA driver API says; a box is that of
// "Tensors" in the PTX ISA (tiled mode, swizzling modes).
#include <cuda.h>

#include <cstring>

#include "async.h"
#include "core.h"

namespace {

struct TensorMap {
  char* memory;
  uint64_t strides[5];  // in bytes, innermost dimension first
  uint32_t sizes[5];
  uint16_t box[5];
  uint8_t rank, element, swizzle;  // element: its bytes; swizzle: bytes of the span whose chunks are permuted
  CUtensorMapDataType type;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* memory,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  TensorMap m{};
  m.memory = static_cast<char*>(memory);
  m.element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  m.swizzle = static_cast<uint8_t>(swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << swizzle);
  if (rank < 1 || rank > 5 || reinterpret_cast<uintptr_t>(memory) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  m.rank = static_cast<uint8_t>(rank);
  m.type = type;
  for (cuuint32_t d = 0; d < rank; ++d) {
    m.strides[d] = d == 0 ? m.element : strides[d - 1];
    if (sizes[d] == 0 || sizes[d] > uint64_t{1} << 32 || box[d] == 0 || box[d] > 256 || element_strides[d] != 1 ||
        (d > 0 && (m.strides[d] % 16 != 0 || m.strides[d] >= uint64_t{1} << 40)))
      return CUDA_ERROR_INVALID_VALUE;
    m.sizes[d] = static_cast<uint32_t>(sizes[d]);
    m.box[d] = static_cast<uint16_t>(box[d]);
  }
  const uint32_t inner = box[0] * m.element;
  if (inner % 16 != 0 || (m.swizzle != 0 && inner > m.swizzle)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &m, sizeof(m));
  return CUDA_SUCCESS;
}

namespace emulation {

std::vector<Piece> box(const void* tensor_map, const int32_t* coordinates, uint32_t to) {
  TensorMap m;
  std::memcpy(&m, tensor_map, sizeof(m));
  const uint32_t inner = m.box[0] * m.element;
  if (to % 128 != 0) fail("cp.async.bulk.tensor: shared address %u, which must be a multiple of 128", to);
  if (m.swizzle != 0 && inner != m.swizzle)
    fail("cp.async.bulk.tensor: the machine knows only boxes as wide as their swizzle, %u bytes, not %u", m.swizzle,
         inner);
  std::vector<Piece> pieces;
  uint32_t rows = 1;
  for (int d = 1; d < m.rank; ++d) rows *= m.box[d];
  for (uint32_t row = 0; row < rows; ++row) {
    char* line = m.memory;
    bool exists = true;
    for (uint32_t d = 1, left = row; d < m.rank; left /= m.box[d++]) {
      const int64_t at = int64_t{coordinates[d]} + left % m.box[d];
      exists = exists && at >= 0 && at < m.sizes[d];
      line += at * static_cast<int64_t>(m.strides[d]);
    }
    for (uint32_t byte = 0; byte < inner; byte += 16) {
      const uint32_t plain = to + row * inner + byte;
      const uint32_t shared = m.swizzle == 0 ? plain : plain ^ ((plain >> 7 & (m.swizzle / 16 - 1)) << 4);
      const int64_t first = int64_t{coordinates[0]} + byte / m.element, count = 16 / m.element;
      const auto global = [&](int64_t element) -> char* {
        return exists && element >= 0 && element < m.sizes[0] ? line + element * m.element : nullptr;
      };
      const bool whole = (global(first) == nullptr) == (global(first + count - 1) == nullptr);
      for (int64_t e = 0; e < (whole ? 1 : count); ++e)
        pieces.push_back({shared + static_cast<uint32_t>(e) * m.element, global(first + e), whole ? 16u : m.element});
    }
  }
  return pieces;
}

Reduction box_sum(const void* tensor_map) {
  TensorMap m;
  std::memcpy(&m, tensor_map, sizeof(m));
  if (m.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16)
    fail("cp.reduce.async.bulk.tensor: the machine does not know sums of float16");
  return m.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? Reduction::add_float : Reduction::add_bfloat16;
}

std::vector<Piece> neighbours(uint32_t shared, void* global, uint32_t bytes) {
  if (shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0)
    fail("cp.async.bulk: shared address %u, global address %p and %u bytes must be multiples of 16", shared, global,
         bytes);
  std::vector<Piece> pieces;
  for (uint32_t i = 0; i < bytes; i += 16) pieces.push_back({shared + i, static_cast<char*>(global) + i, 16});
  return pieces;
}

}  // namespace emulation
