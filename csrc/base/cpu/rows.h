// Rows of the caller's tensors <-> fp32 scratch.
#pragma once

#include "base/cpu/vec_math.h"
#include "base/dtype.h"

namespace flash::cpu::FLASH_ATTN_ISA {

FLASH_INLINE float load_scalar(const void* p, Dtype t, int64_t i) {
  if (t == Dtype::kFloat32) return static_cast<const float*>(p)[i];
  if (t == Dtype::kFloat8E4M3) {
    VecU16 v{};
    v[0] = static_cast<uint16_t>(static_cast<const int8_t*>(p)[i]);
    return fp16_to_float(fp8_to_fp16(v))[0] * kFp8OfFp16;
  }
  VecU16 h{};
  h[0] = static_cast<const uint16_t*>(p)[i];
  return t == Dtype::kBFloat16 ? bf16_to_float(h)[0] : fp16_to_float(h)[0];
}

template <Dtype T>
FLASH_INLINE Vec load_as_float(const void* p, int64_t i) {
  if constexpr (T == Dtype::kFloat32) return load(static_cast<const float*>(p) + i);
  if constexpr (T == Dtype::kFloat8E4M3)
    return fp16_to_float(fp8_to_fp16(load_fp8_words(static_cast<const uint8_t*>(p) + i))) *
           kFp8OfFp16;
  const VecU16 h = load_u16(static_cast<const uint16_t*>(p) + i);
  if constexpr (T == Dtype::kBFloat16) return bf16_to_float(h);
  return fp16_to_float(h);
}

template <Dtype T>
FLASH_INLINE void store_from_float(void* p, int64_t i, Vec v) {
  if constexpr (T == Dtype::kFloat32) {
    store(static_cast<float*>(p) + i, v);
  } else {
    const VecU16 h = T == Dtype::kBFloat16 ? float_to_bf16(v) : float_to_fp16(v);
    store_u16(static_cast<uint16_t*>(p) + i, h);
  }
}

// The last n < kWidth elements of a row, missing ones 0; reads and writes nothing beyond them.
template <Dtype T>
FLASH_INLINE Vec load_tail(const void* p, int64_t i, int n) {
  constexpr int bytes = dtype_bytes(T);
  alignas(64) unsigned char buffer[kWidth * bytes] = {};
  std::memcpy(buffer, static_cast<const unsigned char*>(p) + i * bytes, n * bytes);
  return load_as_float<T>(buffer, 0);
}
template <Dtype T>
FLASH_INLINE void store_tail(void* p, int64_t i, int n, Vec v) {
  constexpr int bytes = dtype_bytes(T);
  alignas(64) unsigned char buffer[kWidth * bytes];
  store_from_float<T>(buffer, 0, v);
  std::memcpy(static_cast<unsigned char*>(p) + i * bytes, buffer, n * bytes);
}

// Calls f with the dtype as a compile-time constant.
template <class F>
FLASH_INLINE void with_dtype(Dtype t, F f) {
  switch (t) {
    case Dtype::kFloat32:
      return f.template operator()<Dtype::kFloat32>();
    case Dtype::kBFloat16:
      return f.template operator()<Dtype::kBFloat16>();
    case Dtype::kFloat16:
      return f.template operator()<Dtype::kFloat16>();
    default:
      __builtin_unreachable();  // no CPU kernel takes it
  }
}

// The same of what is read alone: fp8, too.
template <class F>
FLASH_INLINE void with_input_dtype(Dtype t, F f) {
  if (t == Dtype::kFloat8E4M3) return f.template operator()<Dtype::kFloat8E4M3>();
  with_dtype(t, f);
}

// Rows of one head lie far apart, where hardware prefetching does not follow. kLocality: 3 into L1,
// 2 into L2.
template <int kLocality = 3>
FLASH_INLINE void prefetch_row(Dtype t, const void* row, int64_t d) {
  for (int64_t byte = 0; byte < d * dtype_bytes(t); byte += 64)
    __builtin_prefetch(static_cast<const char*>(row) + byte, 0, kLocality);
}

// dst[0..padded) = scale * src[0..d), then zeros; padded is a multiple of kWidth. Returns false if
// any of them is inf or NaN.
template <Dtype T>
inline bool read_row(float* dst, const void* src, int d, int padded, float scale = 1.f) {
  VecI finite = set1i(-1);
  int i = 0;
  for (; i + kWidth <= d; i += kWidth) {
    const Vec v = load_as_float<T>(src, i) * scale;
    finite &= abs(v) < __builtin_inff();
    store(dst + i, v);
  }
  if (i < d) {
    const Vec v = load_tail<T>(src, i, d - i) * scale;
    finite &= abs(v) < __builtin_inff();
    store(dst + i, v);
    i += kWidth;
  }
  for (; i < padded; i += kWidth) store(dst + i, zero());
  return all_of(finite);
}

// dst[0..d) = scale * src[0..d)
template <Dtype T>
inline void write_row(void* dst, const float* src, int d, float scale) {
  int i = 0;
  for (; i + kWidth <= d; i += kWidth) store_from_float<T>(dst, i, load(src + i) * scale);
  if (i >= d) return;
  alignas(64) float buffer[kWidth] = {};
  std::memcpy(buffer, src + i, (d - i) * sizeof(float));
  store_tail<T>(dst, i, d - i, load(buffer) * scale);
}

inline bool read_row(Dtype t, float* dst, const void* src, int d, int padded, float scale = 1.f) {
  bool finite = true;
  with_input_dtype(t, [&]<Dtype T>() { finite = read_row<T>(dst, src, d, padded, scale); });
  return finite;
}
inline void write_row(Dtype t, void* dst, const float* src, int d, float scale = 1.f) {
  with_dtype(t, [&]<Dtype T>() { write_row<T>(dst, src, d, scale); });
}
inline void zero_row(Dtype t, void* dst, int64_t d) { std::memset(dst, 0, d * dtype_bytes(t)); }

}  // namespace flash::cpu::FLASH_ATTN_ISA
