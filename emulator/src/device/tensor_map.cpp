#include "tensor_map.h"

namespace gpu_emulator {

int element_bytes(TensorElement element) {
  switch (element) {
    case TensorElement::kU8:
      return 1;
    case TensorElement::kU16:
    case TensorElement::kF16:
    case TensorElement::kBf16:
      return 2;
    case TensorElement::kU64:
    case TensorElement::kS64:
    case TensorElement::kF64:
      return 8;
    default:
      return 4;
  }
}

bool is_float(TensorElement element) { return element >= TensorElement::kF16; }

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = static_cast<uint32_t>(element_bytes(map.element));
  for (int i = 0; i < map.rank; ++i) bytes *= box_elements(map, i);
  return bytes;
}

namespace {

std::string dimension_error(const TensorMap& map, int i) {
  const std::string which = "[" + std::to_string(i) + "]";
  if (map.dims[i] == 0 || map.dims[i] > (uint64_t{1} << 32)) {
    return "globalDim" + which + " must be from 1 to 2^32.";
  }
  if (map.box[i] == 0 || map.box[i] > 256) return "boxDim" + which + " must be from 1 to 256.";
  if (map.element_strides[i] == 0 || map.element_strides[i] > 8) {
    return "elementStrides" + which + " must be from 1 to 8.";
  }
  if (i == 0) return "";
  const uint64_t stride = map.strides[i - 1];
  if (stride % 16 != 0 || stride >= (uint64_t{1} << 40)) {
    return "globalStrides[" + std::to_string(i - 1) +
           "] must be a multiple of 16 bytes, less than 2^40.";
  }
  return "";
}

}  // namespace

std::string tensor_map_error(const TensorMap& map) {
  if (map.magic != kTensorMapMagic) return "These bytes are not a tensor map.";
  if (map.rank < 1 || map.rank > kMaxTensorRank) return "tensorRank must be from 1 to 5.";
  if (map.element >= TensorElement::kCount) return "tensorDataType is none that is supported.";
  if (map.interleave != TensorInterleave::kNone) return "interleave is not supported.";
  if (map.swizzle > TensorSwizzle::k128B) return "swizzle is none that is supported.";
  if (map.base % 16 != 0) return "globalAddress must be 16-byte aligned.";
  for (int i = 0; i < map.rank; ++i) {
    const std::string error = dimension_error(map, i);
    if (!error.empty()) return error;
  }
  const int inner = map.box[0] * element_bytes(map.element);
  if (inner % 16 != 0) return "boxDim[0] times the element's size must be a multiple of 16 bytes.";
  if (map.swizzle != TensorSwizzle::kNone && inner > swizzle_bytes(map.swizzle)) {
    return "boxDim[0] times the element's size must not exceed the swizzle's " +
           std::to_string(swizzle_bytes(map.swizzle)) + " bytes.";
  }
  if (map.fill > TensorFill::kNan) return "oobFill is neither zero nor NaN.";
  if (map.fill == TensorFill::kNan && !is_float(map.element)) {
    return "oobFill NaN needs a floating-point tensorDataType.";
  }
  return "";
}

}  // namespace gpu_emulator
