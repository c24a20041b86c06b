#pragma once

// The 128 opaque bytes of a CUtensorMap, as this driver encodes them and the emulated TMA reads
// them. The fields are cuTensorMapEncodeTiled's arguments (CUDA driver API, "Tensor Map Object
// Management"); enumerators have cuda.h's values.

#include <cstdint>
#include <string>

namespace gpu_emulator {

enum class TensorElement : uint8_t {  // CUtensorMapDataType
  kU8,
  kU16,
  kU32,
  kS32,
  kU64,
  kS64,
  kF16,
  kF32,
  kF64,
  kBf16,
  kF32Ftz,
  kTf32,
  kTf32Ftz,
  kCount,  // packed 4- and 6-bit types (sm_100) are not supported
};
enum class TensorInterleave : uint8_t { kNone, k16B, k32B };      // CUtensorMapInterleave
enum class TensorSwizzle : uint8_t { kNone, k32B, k64B, k128B };  // CUtensorMapSwizzle
enum class TensorFill : uint8_t { kZero, kNan };                  // CUtensorMapFloatOOBfill

inline constexpr int kMaxTensorRank = 5;
inline constexpr uint64_t kTensorMapMagic = 0x70616d726f736e74;  // "tnsormap"

struct alignas(64) TensorMap {
  uint64_t magic = kTensorMapMagic;
  uint64_t base = 0;                                // globalAddress
  uint64_t dims[kMaxTensorRank] = {1, 1, 1, 1, 1};  // globalDim, elements
  uint64_t strides[kMaxTensorRank - 1] = {};        // globalStrides, bytes: of dimensions 1, 2, ...
  uint16_t box[kMaxTensorRank] = {1, 1, 1, 1, 1};   // boxDim, elements
  uint8_t element_strides[kMaxTensorRank] = {1, 1, 1, 1, 1};
  uint8_t rank = 0;
  TensorElement element = TensorElement::kU8;
  TensorInterleave interleave = TensorInterleave::kNone;
  TensorSwizzle swizzle = TensorSwizzle::kNone;
  TensorFill fill = TensorFill::kZero;
};
static_assert(sizeof(TensorMap) == 128);

int element_bytes(TensorElement element);
bool is_float(TensorElement element);

// The width in bytes of a swizzle's rows: 0 of kNone.
inline int swizzle_bytes(TensorSwizzle swizzle) {
  return swizzle == TensorSwizzle::kNone ? 0 : 16 << static_cast<int>(swizzle);
}

// Elements along a dimension that one box holds: every element_strides-th of box.
inline uint32_t box_elements(const TensorMap& map, int dimension) {
  const uint32_t stride = dimension == 0 ? 1 : map.element_strides[dimension];
  return (map.box[dimension] + stride - 1) / stride;
}
uint32_t box_bytes(const TensorMap& map);  // of one whole box in shared memory

// Which rule of cuTensorMapEncodeTiled the map breaks, as a sentence; "" = none. The address itself
// may be any: whether it lies in device memory is seen when the map is used.
std::string tensor_map_error(const TensorMap& map);

}  // namespace gpu_emulator
