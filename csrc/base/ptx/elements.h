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

// 4, 8 or 16 bytes, or several times 16, at an address that is a multiple of the first three.
template <int kWords>
FLASH_DEVICE void load_words(uint32_t (&words)[kWords], const void* p) {
  static_assert(kWords == 1 || kWords == 2 || kWords % 4 == 0);
  if constexpr (kWords == 1) {
    words[0] = *static_cast<const uint32_t*>(p);
  } else if constexpr (kWords == 2) {
    const uint2 pair = *static_cast<const uint2*>(p);
    words[0] = pair.x, words[1] = pair.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 chunk = static_cast<const uint4*>(p)[i / 4];
      words[i] = chunk.x, words[i + 1] = chunk.y, words[i + 2] = chunk.z, words[i + 3] = chunk.w;
    }
  }
}

template <int kWords>
FLASH_DEVICE void store_words(void* p, const uint32_t (&words)[kWords]) {
  static_assert(kWords == 1 || kWords == 2 || kWords % 4 == 0);
  if constexpr (kWords == 1) {
    *static_cast<uint32_t*>(p) = words[0];
  } else if constexpr (kWords == 2) {
    *static_cast<uint2*>(p) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4)
      static_cast<uint4*>(p)[i / 4] =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
  }
}

// kCount elements from `p` on: one, or as many as load_words takes at its alignment.
template <Dtype kDtype, int kCount>
FLASH_DEVICE void load_elements(float (&x)[kCount], const void* p) {
  constexpr bool kIsFloat = kDtype == Dtype::kFloat32;
  if constexpr (!kIsFloat && kCount == 1) {
    x[0] = to_float<kDtype>(*static_cast<const uint16_t*>(p));
  } else {
    uint32_t words[kIsFloat ? kCount : kCount / 2];
    load_words(words, p);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kIsFloat) {
        x[i] = __uint_as_float(words[i]);
      } else {
        x[i] = to_float<kDtype>(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
      }
    }
  }
}

// As load_elements.
template <Dtype kDtype, int kCount>
FLASH_DEVICE void store_elements(void* p, const float (&x)[kCount]) {
  constexpr bool kIsFloat = kDtype == Dtype::kFloat32;
  if constexpr (!kIsFloat && kCount == 1) {
    *static_cast<uint16_t*>(p) = from_float<kDtype>(x[0]);
  } else {
    constexpr int kWords = kIsFloat ? kCount : kCount / 2;
    uint32_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kIsFloat) {
        words[i] = __float_as_uint(x[i]);
      } else {
        words[i] = pack<kDtype>(x[2 * i], x[2 * i + 1]);
      }
    }
    store_words(p, words);
  }
}

}  // namespace flash::ptx
