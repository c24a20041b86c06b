// Products of a few rows with keys and values as they lie in memory, without packing: decode's tile
// unit.
//
//   scores   s[m][n] = q[m] . k[n]          vectors along d; the sums of all accumulators by one
//                                           transposing reduction for kTileKeys keys
//   values   o[m] += sum_n p[m][n] v[n]     a strip of dims in registers over a few keys
//
// Both convert a vector of K or V once for a few rows. A unit of bytes of a row makes
// kParts vectors: of bf16 two, the even and the odd elements, for one operation each; q and o lie
// in that order (to_part_order).
#pragma once

#include "base/static_for.h"
#include "cpu/tile_fma.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Accumulators for the latency of two FMAs a cycle, in 16 registers (32 with AVX-512): rows x keys.
// With 12 of 16 gcc 12 spills half of them.
inline constexpr int kScoreM = kWidth == 16 ? 4 : 2;
inline constexpr int kScoreN = kWidth == 16 ? 4 : 5;
inline constexpr int kTileKeys = kWidth == 16 ? 32 : 40;  // keys of a call
// Keys whose sums are reduced together: as few as there can be, since nothing is prefetched
// meanwhile.
inline constexpr int kReducedKeys = kWidth % kScoreN == 0 ? kWidth : kTileKeys;
static_assert(kReducedKeys % kScoreN == 0 && kReducedKeys % kWidth == 0);
static_assert(kTileKeys % kReducedKeys == 0);
inline constexpr int kValueM = 4;  // rows x vectors of a strip: 8 (16) accumulators
template <int M>
inline constexpr int kValueVectors = (kWidth == 16 ? 16 : 8) / (M == 3 ? 4 : M);

template <Dtype T>
struct Unit {
  static constexpr int kParts = T == Dtype::kBFloat16 ? 2 : 1;
  static constexpr int kElements = kParts * kWidth;
  static constexpr int kElementBytes = dtype_bytes(T);
  static constexpr int kBytes = kElements * kElementBytes;
};

template <Dtype T, int kPart>
FLASH_INLINE Vec load_part(const char* p) {
  if constexpr (T == Dtype::kBFloat16) {
    VecU u;
    std::memcpy(&u, p, sizeof(u));
    return from_bits(kPart == 0 ? u << 16 : u & 0xffff0000u);
  } else {
    return load_as_float<T>(p, 0);
  }
}

// The last n elements of a row as a whole unit, missing ones 0.
template <Dtype T>
struct TailUnit {
  alignas(64) char bytes[Unit<T>::kBytes] = {};
  FLASH_INLINE const char* copy(const char* p, int n) {
    if (n == kWidth)  // without a call
      std::memcpy(bytes, p, kWidth * Unit<T>::kElementBytes);
    else
      std::memcpy(bytes, p, n * Unit<T>::kElementBytes);
    return bytes;
  }
};

template <int... kLane>
FLASH_INLINE void split_unit(float* x, std::integer_sequence<int, kLane...>) {
  const Vec a = load(x), b = load(x + kWidth);
  store(x, __builtin_shufflevector(a, b, (2 * kLane)...));
  store(x + kWidth, __builtin_shufflevector(a, b, (2 * kLane + 1)...));
}
template <int... kLane>
FLASH_INLINE void join_unit(float* x, std::integer_sequence<int, kLane...>) {
  const Vec a = load(x), b = load(x + kWidth);
  store(x, __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kWidth)...));
  store(x + kWidth,
        __builtin_shufflevector(a, b, (kWidth / 2 + kLane / 2 + kLane % 2 * kWidth)...));
}
template <Dtype T>
inline void to_part_order(float* x, int padded) {
  if constexpr (Unit<T>::kParts == 2)
    for (int i = 0; i < padded; i += 2 * kWidth)
      split_unit(x + i, std::make_integer_sequence<int, kWidth>{});
}
template <Dtype T>
inline void from_part_order(float* x, int padded) {
  if constexpr (Unit<T>::kParts == 2)
    for (int i = 0; i < padded; i += 2 * kWidth)
      join_unit(x + i, std::make_integer_sequence<int, kWidth>{});
}

// Rows of K or V: row(n) is row n of one head.
struct StreamRows {
  const char* const* first;  // of some head
  int64_t offset;            // bytes from there
  FLASH_INLINE const char* row(int n) const { return first[n] + offset; }
  FLASH_INLINE StreamRows from(int n) const { return {first + n, offset}; }
};

inline constexpr int kLine = 64;  // bytes of a cache line

[[gnu::cold, gnu::noinline]] inline void expand_nan(uint16_t* dst, const char* row, int d) {
  for (int i = 0; i < d; ++i)
    if ((row[i] & 0x7f) == 0x7f) dst[i] = 0x7e00;
}
// A row of fp8 as fp16 of 2^-8 its value (fp8_to_fp16); what comes after it, up to a multiple of
// 2 kWidth, is overwritten. NaN is rare: it is looked for without what would make it.
inline void expand_row(uint16_t* dst, const char* row, int d) {
  VecU16x2 largest{};
  const auto expand = [&](uint16_t* to, const char* from) __attribute__((always_inline)) {
    const VecU16x2 h =
        fp8_to_fp16_but_nan(load_fp8_words_x2(reinterpret_cast<const uint8_t*>(from)));
    const VecU16x2 magnitude = h & kFp8Magnitude;
    largest = magnitude > largest ? magnitude : largest;
    store_u16x2(to, h);
  };
  int i = 0;
  for (; i + 2 * kWidth <= d; i += 2 * kWidth) expand(dst + i, row + i);
  if (i < d) {
    char tail[2 * kWidth] = {};
    std::memcpy(tail, row + i, d - i);
    expand(dst + i, tail);
  }
  const VecU pairs = reinterpret_cast<VecU>(largest);
  const bool finite =
      all_of(((pairs & 0xffffu) != kFp8Magnitude) & ((pairs >> 16) != kFp8Magnitude));
  if (!finite) [[unlikely]]
    expand_nan(dst, row, d);
}

// ------------------------------------------------------------------------------------------------
// scores

// Sums of the halves of blocks of kBlock lanes: a's in the lower half of each block, b's in the
// upper. One shuffle and a blend, which runs on more ports.
template <int kBlock, int... kLane>
FLASH_INLINE Vec add_halves(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  constexpr auto is_low = [](int lane) { return lane % kBlock < kBlock / 2; };
  return __builtin_shufflevector(a, b, (is_low(kLane) ? kLane : kLane + kWidth)...) +
         __builtin_shufflevector(
             a, b, (is_low(kLane) ? kLane + kBlock / 2 : kLane - kBlock / 2 + kWidth)...);
}
// Sums of neighbouring groups of kGroup lanes, within blocks of 4 groups where there are as many:
// a's in the lower half of each block, b's in the upper.
template <int kGroup, int... kLane>
FLASH_INLINE Vec add_neighbours(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  constexpr int kBlock = 4 * kGroup < kWidth ? 4 * kGroup : kWidth;
  constexpr auto source = [](int lane) {
    const int base = lane / kBlock * kBlock, in = lane % kBlock, half = kBlock / 2;
    const int group = in % half / kGroup, rest = in % kGroup;
    return base + 2 * group * kGroup + rest + (in < half ? 0 : kWidth);
  };
  return __builtin_shufflevector(a, b, source(kLane)...) +
         __builtin_shufflevector(a, b, (source(kLane) + kGroup)...);
}

// Lane i: the sum of the lanes of x[i], i < kWidth. Each level halves the number of vectors: first
// within 4 lanes, then across blocks of 4, as shuffles are cheap.
template <int kVectors = kWidth>
FLASH_INLINE Vec sums_of(const Vec* x) {
  if constexpr (kVectors == 1) {
    return x[0];
  } else {
    constexpr int kAdded = kWidth / kVectors;  // 1, 2: within 4 lanes; 4, 8: across them
    constexpr auto kLanes = std::make_integer_sequence<int, kWidth>{};
    Vec y[kVectors / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors / 2; ++i) {
      if constexpr (kAdded == 1)
        y[i] = add_halves<4>(x[2 * i], x[2 * i + 1], kLanes);
      else if constexpr (kAdded == 4)
        y[i] = add_halves<kWidth>(x[2 * i], x[2 * i + 1], kLanes);
      else
        y[i] = add_neighbours<(kAdded < 4 ? 1 : 4)>(x[2 * i], x[2 * i + 1], kLanes);
    }
    return sums_of<kVectors / 2>(y);
  }
}

// s = Q K^T of up to kScoreM rows and kTileKeys keys.
struct ScoreProduct {
  const float* q;  // [m][d rounded up to kTileN], in part order
  int64_t q_ld;
  StreamRows k, ahead;  // ahead: rows that will be read later
  bool prefetch;        // those
  int d;
  float* s;  // [m][n]
  int64_t s_ld;
};

// sums[m][n] = q[m] * k[first + n], n < kScoreN, not yet added up over the lanes.
template <Dtype T, int M>
FLASH_INLINE void multiply_keys(const ScoreProduct& x, int first, Vec* sums) {
  constexpr int kBytes = Unit<T>::kElementBytes, kElements = Unit<T>::kElements;
  const float* q = x.q;
  const int64_t q_ld = x.q_ld;
  const StreamRows ahead = x.ahead.from(first);
  Vec acc[M][kScoreN] = {};
  const char* row[kScoreN];
#pragma GCC unroll 8
  for (int n = 0; n < kScoreN; ++n) row[n] = x.k.row(first + n);
  const auto add = [&](int i, int64_t byte) __attribute__((always_inline)) {
    static_for<Unit<T>::kParts>([&](auto part) __attribute__((always_inline)) {
      constexpr int kPart = part;
      Vec qv[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) qv[m] = load(q + m * q_ld + i + kPart * kWidth);
#pragma GCC unroll 8
      for (int n = 0; n < kScoreN; ++n) {
        const Vec kv = load_part<T, kPart>(row[n] + byte);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) acc[m][n] = fma(qv[m], kv, acc[m][n]);
      }
    });
  };
  const int prefetched = x.prefetch ? kScoreN : 0, d = x.d;
  int i = 0;
  for (; i + kElements <= d; i += kElements) {
    if (i * kBytes % kLine == 0)
      for (int n = 0; n < prefetched; ++n) __builtin_prefetch(ahead.row(n) + i * kBytes);
    add(i, int64_t{i} * kBytes);
  }
  if (i < d) {
    TailUnit<T> tail[kScoreN];
    for (int n = 0; n < kScoreN; ++n) row[n] = tail[n].copy(row[n] + i * kBytes, d - i);
    add(i, 0);
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kScoreN; ++n) sums[m * kReducedKeys + n] = acc[m][n];
}

template <Dtype T, int M>
inline void dot_keys(const ScoreProduct& x) {
  for (int first = 0; first < kTileKeys; first += kReducedKeys) {
    Vec sums[M * kReducedKeys];
    for (int n = 0; n < kReducedKeys; n += kScoreN) multiply_keys<T, M>(x, first + n, sums + n);
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < kReducedKeys; j += kWidth)
        store(x.s + m * x.s_ld + first + j, sums_of(sums + m * kReducedKeys + j));
  }
}

// ------------------------------------------------------------------------------------------------
// values

// P V of up to kValueM rows, added to o.
struct ValueProduct {
  const float* p;  // [m][n]
  int64_t p_ld;
  StreamRows v, ahead;  // ahead: rows that will be read later, prefetched
  int keys, d;
  float* o;  // [m][d rounded up to kTileN], in part order
  int64_t o_ld;
};

// kVectors vectors of o. unit(n) is where those of v's row n begin.
template <Dtype T, int M, int kVectors, class RowUnit>
FLASH_INLINE void accumulate_strip(const ValueProduct& x, float* o, RowUnit unit) {
  Vec acc[M][kVectors];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) acc[m][j] = load(o + m * x.o_ld + j * kWidth);
  for (int n = 0; n < x.keys; ++n) {
    const char* v = unit(n);
    Vec weight[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) weight[m] = set1(x.p[m * x.p_ld + n]);
    static_for<kVectors>([&](auto j) __attribute__((always_inline)) {
      constexpr int kParts = Unit<T>::kParts, kJ = j;
      const Vec vj = load_part<T, kJ % kParts>(v + kJ / kParts * Unit<T>::kBytes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m][kJ] = fma(weight[m], vj, acc[m][kJ]);
    });
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(o + m * x.o_ld + j * kWidth, acc[m][j]);
}

// The next kVectors vectors of o, after `done`.
template <Dtype T, int M, int kVectors>
FLASH_INLINE void accumulate_vectors(const ValueProduct& x, int& done, bool prefetch) {
  constexpr int kStripBytes = kVectors * kWidth * Unit<T>::kElementBytes;
  const int64_t byte = int64_t{done} * kWidth * Unit<T>::kElementBytes;
  const char* const* first = x.v.first;
  const char* const* next = x.ahead.first;
  const int64_t offset = x.v.offset + byte, next_offset = x.ahead.offset + byte;
  float* o = x.o + done * kWidth;
  done += kVectors;
  if (!prefetch)
    return accumulate_strip<T, M, kVectors>(x, o, [=](int n) { return first[n] + offset; });
  accumulate_strip<T, M, kVectors>(x, o, [=](int n) __attribute__((always_inline)) {
    for (int i = 0; i < kStripBytes; i += kLine) __builtin_prefetch(next[n] + next_offset + i);
    return first[n] + offset;
  });
}

template <Dtype T, int M>
inline void accumulate_values(const ValueProduct& x, bool prefetch) {
  constexpr int kParts = Unit<T>::kParts, kMost = kValueVectors<M>;
  const int vectors = x.d / Unit<T>::kElements * kParts;
  int done = 0;
  while (vectors - done >= kMost) accumulate_vectors<T, M, kMost>(x, done, prefetch);
  static_for<3>([&](auto halvings) __attribute__((always_inline)) {  // 8, 4, 2
    constexpr int kVectors = 8 >> halvings;
    if constexpr (kVectors < kMost)
      if (vectors - done >= kVectors) accumulate_vectors<T, M, kVectors>(x, done, prefetch);
  });
  if constexpr (kParts == 1)
    if (done < vectors) accumulate_vectors<T, M, 1>(x, done, prefetch);
  const int i = vectors * kWidth;
  if (i == x.d) return;
  TailUnit<T> tail;
  accumulate_strip<T, M, kParts>(x, x.o + i, [&](int n) {
    return tail.copy(x.v.row(n) + i * Unit<T>::kElementBytes, x.d - i);
  });
}

// The same for one row where zeros in p hide rows of V that hold inf or NaN.
template <Dtype T>
inline void accumulate_values_skipping_zeros(const ValueProduct& x) {
  ValueProduct one = x;
  one.keys = 1;
  for (int n = 0; n < x.keys; ++n) {
    one.p = x.p + n;
    one.v = x.v.from(n);
    if (x.p[n] != 0.f) accumulate_values<T, 1>(one, false);
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
