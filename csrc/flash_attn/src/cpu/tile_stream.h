// Products of a few rows with keys and values as they lie in memory, without packing: decode's tile
// unit.
//
//   scores   s[m][n] = q[m] . k[n]          vectors along d, kTileKeys keys at a time; the sums of
//                                           all accumulators by one transposing reduction
//   values   o[m] += sum_n p[m][n] v[n]     a strip of dims in registers over a few keys
//
// Both convert a vector of K or V once for kStreamM rows. Vectors come in pairs of kTileN elements.
// Those of bf16 hold the even and the odd elements, which costs one operation each; q and o lie in
// that "pair order".
#pragma once

#include "cpu/tile_fma.h"

namespace flash::cpu::FLASH_ATTN_ISA {

inline constexpr int kStreamM = 4;                       // rows that share a conversion
inline constexpr int kTileKeys = kWidth == 16 ? 16 : 8;  // also the number of accumulators
static_assert(kTileKeys % kWidth == 0 && kTileVectors == 2);

// Rows of K or V: row(n) is row n of one head.
struct StreamRows {
  const char* const* first;  // of the heads' first one
  int64_t offset;            // bytes from there
  FLASH_INLINE const char* row(int n) const { return first[n] + offset; }
};

template <Dtype T>
FLASH_INLINE void load_pair(const char* p, Vec& a, Vec& b) {
  if constexpr (T == Dtype::kBFloat16) {
    VecU u;
    std::memcpy(&u, p, sizeof(u));
    a = from_bits(u << 16);
    b = from_bits(u & 0xffff0000u);
  } else {
    a = load_as_float<T>(p, 0);
    b = load_as_float<T>(p, kWidth);
  }
}

// The last n < kTileN elements of a row, missing ones 0.
template <Dtype T>
FLASH_INLINE void load_pair_tail(const char* p, int n, Vec& a, Vec& b) {
  constexpr int bytes = T == Dtype::kFloat32 ? 4 : 2;
  alignas(64) char buffer[kTileN * bytes] = {};
  if (n == kWidth)
    std::memcpy(buffer, p, kWidth * bytes);  // without a call
  else
    std::memcpy(buffer, p, n * bytes);
  load_pair<T>(buffer, a, b);
}

template <int... kLane>
FLASH_INLINE void split_pair(float* x, std::integer_sequence<int, kLane...>) {
  const Vec a = load(x), b = load(x + kWidth);
  store(x, __builtin_shufflevector(a, b, (2 * kLane)...));
  store(x + kWidth, __builtin_shufflevector(a, b, (2 * kLane + 1)...));
}
template <int... kLane>
FLASH_INLINE void join_pair(float* x, std::integer_sequence<int, kLane...>) {
  const Vec a = load(x), b = load(x + kWidth);
  store(x, __builtin_shufflevector(a, b, (kLane / 2 + kLane % 2 * kWidth)...));
  store(x + kWidth,
        __builtin_shufflevector(a, b, (kWidth / 2 + kLane / 2 + kLane % 2 * kWidth)...));
}
template <Dtype T>
inline void to_pair_order(float* x, int padded) {
  if constexpr (T == Dtype::kBFloat16)
    for (int i = 0; i < padded; i += kTileN)
      split_pair(x + i, std::make_integer_sequence<int, kWidth>{});
}
template <Dtype T>
inline void from_pair_order(float* x, int padded) {
  if constexpr (T == Dtype::kBFloat16)
    for (int i = 0; i < padded; i += kTileN)
      join_pair(x + i, std::make_integer_sequence<int, kWidth>{});
}

// Rows that will be read soon, prefetched one at a time.
class RowPrefetch {
 public:
  FLASH_INLINE RowPrefetch(StreamRows rows, int count, int bytes)
      : rows_(rows), count_(count), bytes_(bytes) {}
  FLASH_INLINE void next(int rows) {
    for (const int end = next_ + rows < count_ ? next_ + rows : count_; next_ < end; ++next_) {
      const char* row = rows_.row(next_);
      for (int byte = 0; byte < bytes_; byte += 64) __builtin_prefetch(row + byte);
    }
  }

 private:
  StreamRows rows_;
  int count_, bytes_;
  int next_ = 0;
};

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

// Lane i: the sum of the lanes of x[i], i < kWidth. Each level adds neighbours and halves the
// number of vectors: first within 4 lanes, then across blocks of 4, as shuffles are cheap.
template <int kVectors = kWidth>
FLASH_INLINE Vec sums_of(const Vec* x) {
  if constexpr (kVectors == 1) {
    return x[0];
  } else {
    Vec y[kVectors / 2];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors / 2; ++i)
      y[i] = add_neighbours<(kWidth / kVectors < 4 ? 1 : 4)>(
          x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, kWidth>{});
    return sums_of<kVectors / 2>(y);
  }
}

// s[m][n] for M rows and N keys.
template <Dtype T, int M, int N>
FLASH_INLINE void dot_tile(const float* q, int64_t q_ld, StreamRows k, int d, float* s,
                           int64_t s_ld) {
  constexpr int bytes = T == Dtype::kFloat32 ? 4 : 2;
  Vec acc[kTileKeys] = {};
  const char* row[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) row[n] = k.row(n);
  const auto add = [&](int i, auto load_k) __attribute__((always_inline)) {
    Vec a[N], b[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) load_k(row[n] + i * bytes, a[n], b[n]);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec q0 = load(q + m * q_ld + i), q1 = load(q + m * q_ld + i + kWidth);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m * N + n] = fma(q0, a[n], acc[m * N + n]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[m * N + n] = fma(q1, b[n], acc[m * N + n]);
    }
  };
  int i = 0;
  for (; i + kTileN <= d; i += kTileN)
    add(i, [](const char* p, Vec& a, Vec& b) { load_pair<T>(p, a, b); });
  if (i < d) add(i, [&](const char* p, Vec& a, Vec& b) { load_pair_tail<T>(p, d - i, a, b); });
#pragma GCC unroll 4
  for (int first = 0; first < M * N; first += kWidth) {
    alignas(64) float sums[kWidth];
    store(sums, sums_of(acc + first));
    constexpr int kRun = N < kWidth ? N : kWidth;  // sums that lie in the same row of s
    for (int j = 0; j < kWidth && first + j < M * N; j += kRun)
      std::memcpy(s + (first + j) / N * s_ld + (first + j) % N, sums + j, sizeof(float) * kRun);
  }
}

// s[m][0..kTileKeys), prefetching as it goes.
template <Dtype T, int M>
inline void dot_keys(const float* q, int64_t q_ld, StreamRows k, int d, float* s, int64_t s_ld,
                     RowPrefetch& ahead) {
  constexpr int N = kTileKeys / (M == 3 ? 4 : M);
  for (int n = 0; n < kTileKeys; n += N) {
    ahead.next(N);
    dot_tile<T, M, N>(q, q_ld, {k.first + n, k.offset}, d, s + n, s_ld);
  }
}

// A product P V of up to kStreamM rows.
struct ValueProduct {
  const float* p;  // [m][n]
  int64_t p_ld;
  StreamRows v;
  int keys, d;
  float* o;  // [m][d rounded up to kTileN]
  int64_t o_ld;
};

// o[m][i..i + kPairs * kTileN) += p[m] v
template <Dtype T, int M, int kPairs, class Load>
FLASH_INLINE void accumulate_strip(const ValueProduct& x, int i, Load load_v) {
  constexpr int bytes = T == Dtype::kFloat32 ? 4 : 2;
  Vec acc[M][2 * kPairs];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < 2 * kPairs; ++j) acc[m][j] = load(x.o + m * x.o_ld + i + j * kWidth);
  for (int n = 0; n < x.keys; ++n) {
    const char* row = x.v.row(n) + i * bytes;
    Vec v[2 * kPairs];
#pragma GCC unroll 4
    for (int j = 0; j < kPairs; ++j) load_v(row + j * kTileN * bytes, v[2 * j], v[2 * j + 1]);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const Vec p = set1(x.p[m * x.p_ld + n]);
#pragma GCC unroll 8
      for (int j = 0; j < 2 * kPairs; ++j) acc[m][j] = fma(p, v[j], acc[m][j]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < 2 * kPairs; ++j) store(x.o + m * x.o_ld + i + j * kWidth, acc[m][j]);
}

template <Dtype T, int M>
inline void accumulate_values(const ValueProduct& x, RowPrefetch& ahead) {
  constexpr int kPairs = kTileKeys / 2 / (M == 3 ? 4 : M);
  constexpr int kStep = kPairs * kTileN;
  const auto whole = [](const char* p, Vec& a, Vec& b) { load_pair<T>(p, a, b); };
  const int rows_a_strip = (x.keys * kStep + x.d - 1) / x.d;
  int i = 0;
  for (; i + kStep <= x.d; i += kStep) {
    ahead.next(rows_a_strip);
    accumulate_strip<T, M, kPairs>(x, i, whole);
  }
  for (; i + kTileN <= x.d; i += kTileN) accumulate_strip<T, M, 1>(x, i, whole);
  if (i < x.d)
    accumulate_strip<T, M, 1>(
        x, i, [&](const char* p, Vec& a, Vec& b) { load_pair_tail<T>(p, x.d - i, a, b); });
}

// The same for one row where zeros in p hide rows of V that hold inf or NaN.
template <Dtype T>
inline void accumulate_values_skipping_zeros(const ValueProduct& x) {
  for (int n = 0; n < x.keys; ++n) {
    if (x.p[n] == 0.f) continue;
    for (int i = 0; i < x.d; i += kTileN) {
      constexpr int bytes = T == Dtype::kFloat32 ? 4 : 2;
      Vec a, b;
      if (x.d - i >= kTileN)
        load_pair<T>(x.v.row(n) + i * bytes, a, b);
      else
        load_pair_tail<T>(x.v.row(n) + i * bytes, x.d - i, a, b);
      store(x.o + i, fma(set1(x.p[n]), a, load(x.o + i)));
      store(x.o + i + kWidth, fma(set1(x.p[n]), b, load(x.o + i + kWidth)));
    }
  }
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
