// Elements of tensors as fp32, one or a chunk of 16 bytes at a time.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "base/dtype.h"
#include "base/host_device.h"
#include "base/ptx/math.h"

namespace flash::ptx {

// A 16-bit float.
template <Dtype kDtype>
FLASH_DEVICE float to_float(uint16_t bits) {
  if constexpr (kDtype == Dtype::kBFloat16) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    static_assert(kDtype == Dtype::kFloat16);
    return __half2float(__ushort_as_half(bits));
  }
}

template <Dtype kDtype>
FLASH_DEVICE uint16_t from_float(float x) {
  return static_cast<uint16_t>(pack<kDtype>(x, 0.f));
}

template <Dtype kDtype>
inline constexpr int kElementsOfChunk = 16 / dtype_bytes(kDtype);

// kCount elements from `p` on: a whole chunk or half of one, at an address that is a multiple of
// its size, or 1.
template <Dtype kDtype, int kCount>
FLASH_DEVICE void load_elements(float (&x)[kCount], const void* p) {
  static_assert(kCount == 1 || kCount == kElementsOfChunk<kDtype> ||
                (kDtype != Dtype::kFloat32 && kCount == 4));
  if constexpr (kDtype == Dtype::kFloat32 && kCount == 1) {
    x[0] = *static_cast<const float*>(p);
  } else if constexpr (kDtype == Dtype::kFloat32) {
    const float4 chunk = *static_cast<const float4*>(p);
    x[0] = chunk.x, x[1] = chunk.y, x[2] = chunk.z, x[3] = chunk.w;
  } else if constexpr (kCount == 1) {
    x[0] = to_float<kDtype>(*static_cast<const uint16_t*>(p));
  } else if constexpr (kCount == 4) {
    const uint2 half = *static_cast<const uint2*>(p);
    const uint32_t pairs[] = {half.x, half.y};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      x[i] = to_float<kDtype>(static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16)));
  } else {
    const uint4 chunk = *static_cast<const uint4*>(p);
    const uint32_t pairs[] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      x[i] = to_float<kDtype>(static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16)));
  }
}

template <Dtype kDtype, int kCount>
FLASH_DEVICE void store_elements(void* p, const float (&x)[kCount]) {
  static_assert(kCount == 1 || kCount == kElementsOfChunk<kDtype> ||
                (kDtype != Dtype::kFloat32 && kCount == 4));
  if constexpr (kDtype == Dtype::kFloat32 && kCount == 1) {
    *static_cast<float*>(p) = x[0];
  } else if constexpr (kDtype == Dtype::kFloat32) {
    *static_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
  } else if constexpr (kCount == 1) {
    *static_cast<uint16_t*>(p) = from_float<kDtype>(x[0]);
  } else if constexpr (kCount == 4) {
    *static_cast<uint2*>(p) = make_uint2(pack<kDtype>(x[0], x[1]), pack<kDtype>(x[2], x[3]));
  } else {
    *static_cast<uint4*>(p) = make_uint4(pack<kDtype>(x[0], x[1]), pack<kDtype>(x[2], x[3]),
                                         pack<kDtype>(x[4], x[5]), pack<kDtype>(x[6], x[7]));
  }
}

}  // namespace flash::ptx
