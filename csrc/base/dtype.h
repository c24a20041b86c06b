// Element types.
#pragma once

#include "base/host_device.h"
#include "flash_attn/types.h"

namespace flash {

// Those of the C interface, by the same numbers.
enum class Dtype : int {
  kFloat16 = FLASH_ATTN_FLOAT16,
  kBFloat16 = FLASH_ATTN_BFLOAT16,
  kFloat32 = FLASH_ATTN_FLOAT32,
  kInt32 = FLASH_ATTN_INT32,
  kInt64 = FLASH_ATTN_INT64,
  kOther = FLASH_ATTN_OTHER_DTYPE,
  kFloat8E4M3 = FLASH_ATTN_FLOAT8_E4M3,
};

// Of one element; 1 for what is not known.
FLASH_INLINE constexpr int dtype_bytes(Dtype t) {
  switch (t) {
    case Dtype::kFloat16:
    case Dtype::kBFloat16:
      return 2;
    case Dtype::kFloat32:
    case Dtype::kInt32:
      return 4;
    case Dtype::kInt64:
      return 8;
    default:
      return 1;
  }
}
FLASH_INLINE constexpr int64_t element_bytes(flash_attn_dtype t) {
  return dtype_bytes(static_cast<Dtype>(t));
}

// As tables and sentences have it.
constexpr const char* dtype_name(Dtype t) {
  switch (t) {
    case Dtype::kFloat16:
      return "fp16";
    case Dtype::kBFloat16:
      return "bf16";
    case Dtype::kFloat32:
      return "fp32";
    case Dtype::kInt32:
      return "int32";
    case Dtype::kInt64:
      return "int64";
    case Dtype::kFloat8E4M3:
      return "fp8";
    default:
      return "another dtype";
  }
}

}  // namespace flash
