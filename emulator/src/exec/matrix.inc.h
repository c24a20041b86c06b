// Matrix products of mma.sync m16n8kK. Included by isa_*.cpp in the namespace of one instruction
// set, as lanes.inc.h is.
//
// Fragments (PTX 9.7.14.5). With g = lane / 4, t = lane % 4 and E elements of A or B in a register
// (1 of tf32, 2 of 16 bits, 4 of 8 bits), register r of A holds row g + 8 (r % 2), columns
// 4 E (r / 2) + E t + e; register r of B holds rows 4 E r + E t + e of column g; C and D hold row
// g + 8 (r / 2), column 2 t + r % 2. So column k of A is one lane in four of a register, repeated
// over the four: a permutation within 128 bits, and row k of B is needed in every group of four.
//
// Sums are fp32, in the order of k, one rounding a product (products of these types are exact).

inline constexpr int kVectorLanes = GPU_EMULATOR_VECTOR_BYTES / 4;
inline constexpr int kVectors = kWarpSize / kVectorLanes;

using VF = float __attribute__((vector_size(GPU_EMULATOR_VECTOR_BYTES), may_alias));
using VI = int32_t __attribute__((vector_size(GPU_EMULATOR_VECTOR_BYTES), may_alias));
inline constexpr int kQuadsBytes = GPU_EMULATOR_VECTOR_BYTES > 16 ? 32 : 16;
using QuadsF = float __attribute__((vector_size(kQuadsBytes), may_alias));
using QuadsI = int32_t __attribute__((vector_size(kQuadsBytes), may_alias));
using V4F = float __attribute__((vector_size(16), may_alias));
using V4I = int32_t __attribute__((vector_size(16), may_alias));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VF;
  using quad = V4F;
  using quads = QuadsF;
};
template <>
struct VectorOf<int32_t> {
  using type = VI;
  using quad = V4I;
  using quads = QuadsI;
};

inline VF multiply_add(VF a, VF b, VF c) {
#if defined(__AVX512F__)
  return (VF)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (VF)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline VI multiply_add(VI a, VI b, VI c) { return a * b + c; }

// Lane q of each group of four, in all four.
template <int kQ, class V>
inline V splat_quad(V x) {
#if GPU_EMULATOR_VECTOR_BYTES == 64
  return __builtin_shufflevector(x, x, kQ, kQ, kQ, kQ, kQ + 4, kQ + 4, kQ + 4, kQ + 4, kQ + 8,
                                 kQ + 8, kQ + 8, kQ + 8, kQ + 12, kQ + 12, kQ + 12, kQ + 12);
#elif GPU_EMULATOR_VECTOR_BYTES == 32
  return __builtin_shufflevector(x, x, kQ, kQ, kQ, kQ, kQ + 4, kQ + 4, kQ + 4, kQ + 4);
#else
  return __builtin_shufflevector(x, x, kQ, kQ, kQ, kQ);
#endif
}

template <class T>
inline typename VectorOf<T>::type repeat_quad(const T* four) {
  using Quad = typename VectorOf<T>::quad;
  const Quad x = *reinterpret_cast<const Quad*>(four);
#if GPU_EMULATOR_VECTOR_BYTES == 64
  return (typename VectorOf<T>::type)_mm512_broadcast_f32x4((__m128)x);
#elif GPU_EMULATOR_VECTOR_BYTES == 32
  const auto y = (__m128)x;
  return (typename VectorOf<T>::type)_mm256_broadcast_ps(&y);
#else
  return x;
#endif
}

inline float f16_value(uint32_t h) {
  const uint32_t magnitude = h & 0x7fff;
  const uint32_t sign = (h & 0x8000) << 16;
  // The exponent moved up by 112 by a product, which makes subnormals normal.
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  const uint32_t special = magnitude << 13 | 0x7f800000u;
  const uint32_t bits = magnitude >= 0x7c00 ? special : __builtin_bit_cast(uint32_t, scaled);
  return __builtin_bit_cast(float, bits | sign);
}

// Table of the 256 values of an 8-bit float: e exponent bits, bias, and whether it has infinities.
template <MatrixType kType>
struct Fp8Table {
  float value[256];
  constexpr Fp8Table() : value() {
    constexpr bool kE4 = kType == MatrixType::kE4m3;
    constexpr int kMantissa = kE4 ? 3 : 2, kBias = kE4 ? 7 : 15;
    for (int bits = 0; bits < 256; ++bits) {
      const int mantissa = bits & ((1 << kMantissa) - 1);
      const int exponent = (bits & 0x7f) >> kMantissa;
      float x = static_cast<float>(mantissa + (exponent ? 1 << kMantissa : 0));
      int shift = (exponent ? exponent : 1) - kBias - kMantissa;
      for (; shift > 0; --shift) x *= 2.0f;
      for (; shift < 0; ++shift) x *= 0.5f;
      if (kE4 ? (bits & 0x7f) == 0x7f : exponent == 31 && mantissa != 0) x = __builtin_nanf("");
      if (!kE4 && exponent == 31 && mantissa == 0) x = __builtin_inff();
      value[bits] = bits & 0x80 ? -x : x;
    }
  }
};

#if defined(__F16C__)
// The pairs of a register's lanes: out[0] low halves, out[1] high ones.
inline void widen_pairs(const uint32_t* reg, float (*out)[kWarpSize]) {
  const __m256i split = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  for (int i = 0; i < kWarpSize; i += 8) {
    const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(reg + i));
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(pairs, split), 0xd8);
    _mm256_store_ps(out[0] + i, _mm256_cvtph_ps(_mm256_castsi256_si128(halves)));
    _mm256_store_ps(out[1] + i, _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
  }
}
#endif

// Element e of a register's 32 lanes.
template <MatrixType kType, class T>
inline void widen(const uint32_t* reg, int e, T* out) {
  if constexpr (kType == MatrixType::kTf32) {
    for (int i = 0; i < kWarpSize; ++i) out[i] = __builtin_bit_cast(float, reg[i] & 0xffffe000u);
  } else if constexpr (kType == MatrixType::kBf16) {
    const int shift = e ? 0 : 16;
    const uint32_t keep = 0xffff0000u;
    for (int i = 0; i < kWarpSize; ++i) {
      out[i] = __builtin_bit_cast(float, reg[i] << shift & keep);
    }
  } else if constexpr (kType == MatrixType::kF16) {
    const int shift = 16 * e;
    for (int i = 0; i < kWarpSize; ++i) out[i] = f16_value(reg[i] >> shift & 0xffff);
  } else if constexpr (kType == MatrixType::kS8) {
    for (int i = 0; i < kWarpSize; ++i) out[i] = static_cast<int8_t>(reg[i] >> (8 * e));
  } else if constexpr (kType == MatrixType::kU8) {
    for (int i = 0; i < kWarpSize; ++i) out[i] = static_cast<uint8_t>(reg[i] >> (8 * e));
  } else {
    static constexpr Fp8Table<kType> kTable;
    for (int i = 0; i < kWarpSize; ++i) out[i] = kTable.value[reg[i] >> (8 * e) & 0xff];
  }
}

// All elements of a register: out[e][lane].
template <MatrixType kType, class T, int kElements>
inline void widen_register(const uint32_t* reg, T (*out)[kWarpSize],
                           std::integral_constant<int, kElements>) {
#if defined(__F16C__)
  if constexpr (kType == MatrixType::kF16) {
    widen_pairs(reg, out);
    return;
  }
#endif
  for (int e = 0; e < kElements; ++e) widen<kType>(reg, e, out[e]);
}

// x[i] holds row i of a 4 x 4 matrix in each 128 bits: transposes them.
#if GPU_EMULATOR_VECTOR_BYTES > 16
template <class V>
inline void transpose_quads(V (&x)[4]) {
  const V low01 = __builtin_shufflevector(x[0], x[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const V high01 = __builtin_shufflevector(x[0], x[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const V low23 = __builtin_shufflevector(x[2], x[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const V high23 = __builtin_shufflevector(x[2], x[3], 2, 10, 3, 11, 6, 14, 7, 15);
  x[0] = __builtin_shufflevector(low01, low23, 0, 1, 8, 9, 4, 5, 12, 13);
  x[1] = __builtin_shufflevector(low01, low23, 2, 3, 10, 11, 6, 7, 14, 15);
  x[2] = __builtin_shufflevector(high01, high23, 0, 1, 8, 9, 4, 5, 12, 13);
  x[3] = __builtin_shufflevector(high01, high23, 2, 3, 10, 11, 6, 7, 14, 15);
}
#else
template <class V>
inline void transpose_quads(V (&x)[4]) {
  const V low01 = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5);
  const V high01 = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
  const V low23 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const V high23 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  x[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  x[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}
#endif

// Lane (4 c + t) of `in` to out[t][c / 2 + 4 (c % 2)]: even columns, then odd ones.
template <class T>
inline void transpose_columns(const T* in, T out[4][8]) {
  using Rows = typename VectorOf<T>::quads;
  constexpr int kWidth = sizeof(Rows) / sizeof(T);
  for (int first = 0; first < 8; first += kWidth) {
    Rows x[4];
    for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const Rows*>(in + 8 * i + first);
    transpose_quads(x);
    for (int t = 0; t < 4; ++t) *reinterpret_cast<Rows*>(out[t] + first) = x[t];
  }
}

template <class T, int kElements>
struct FragmentBuffers {                     // of 4 E values of k
  alignas(64) T a[2][kElements][kWarpSize];  // rows 0-7, 8-15
  alignas(64) T b[kElements][4][8];
};

template <MatrixType kA, MatrixType kB, class T, int kElements>
inline void widen_fragments(Warp& warp, const Slot* a, Slot b, FragmentBuffers<T, kElements>& out) {
  constexpr std::integral_constant<int, kElements> kCount;
  widen_register<kA>(warp.lanes<uint32_t>(a[0]), out.a[0], kCount);
  widen_register<kA>(warp.lanes<uint32_t>(a[1]), out.a[1], kCount);
  alignas(64) T columns[kElements][kWarpSize];
  widen_register<kB>(warp.lanes<uint32_t>(b), columns, kCount);
  for (int e = 0; e < kElements; ++e) transpose_columns(columns[e], out.b[e]);
}

template <class T>
struct Rows8 {  // eight rows of an accumulator: its even and its odd columns
  using V = typename VectorOf<T>::type;
  V even[kVectors], odd[kVectors];
};

template <int kQ, class T, int kElements>
inline void accumulate_quad(const FragmentBuffers<T, kElements>& f, int half, Rows8<T>& sums) {
  using V = typename VectorOf<T>::type;
#pragma GCC unroll 4
  for (int e = 0; e < kElements; ++e) {
    const V b_even = repeat_quad(&f.b[e][kQ][0]);
    const V b_odd = repeat_quad(&f.b[e][kQ][4]);
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const V raw = *reinterpret_cast<const V*>(&f.a[half][e][j * kVectorLanes]);
      const V a = splat_quad<kQ>(raw);
      sums.even[j] = multiply_add(a, b_even, sums.even[j]);
      sums.odd[j] = multiply_add(a, b_odd, sums.odd[j]);
    }
  }
}

// c, d: the half's two registers.
template <class T, int kElements, int kBlocks>
inline void accumulate_half(const FragmentBuffers<T, kElements> (&blocks)[kBlocks], int half,
                            const uint32_t* const* c, uint32_t* const* d) {
  using V = typename VectorOf<T>::type;
  Rows8<T> sums;
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    sums.even[j] = *reinterpret_cast<const V*>(c[0] + j * kVectorLanes);
    sums.odd[j] = *reinterpret_cast<const V*>(c[1] + j * kVectorLanes);
  }
  for (int block = 0; block < kBlocks; ++block) {
    accumulate_quad<0>(blocks[block], half, sums);
    accumulate_quad<1>(blocks[block], half, sums);
    accumulate_quad<2>(blocks[block], half, sums);
    accumulate_quad<3>(blocks[block], half, sums);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) {
    *reinterpret_cast<V*>(d[0] + j * kVectorLanes) = sums.even[j];
    *reinterpret_cast<V*>(d[1] + j * kVectorLanes) = sums.odd[j];
  }
}

template <MatrixType kA, MatrixType kB, int kBlocks>
Step run_mma(Warp& warp, const Instruction& in, uint32_t mask) {
  constexpr bool kInteger = kA == MatrixType::kS8 || kA == MatrixType::kU8;
  constexpr int kElements = kA == MatrixType::kTf32                             ? 1
                            : kA == MatrixType::kBf16 || kA == MatrixType::kF16 ? 2
                                                                                : 4;
  using T = std::conditional_t<kInteger, int32_t, float>;
  if (mask != warp.live) require_converged(warp, mask, "mma");
  const Slot* slots = warp.list(in);
  const Slot *a = slots + 4, *b = a + 2 * kBlocks, *c = b + kBlocks;
  FragmentBuffers<T, kElements> blocks[kBlocks];
  for (int block = 0; block < kBlocks; ++block) {
    widen_fragments<kA, kB>(warp, a + 2 * block, b[block], blocks[block]);
  }
  // Beside the registers where D may not be written at once: its first half may be C's second.
  alignas(64) uint32_t beside[4][kWarpSize];
  const bool crosses = slots[0] == c[2] || slots[0] == c[3] || slots[1] == c[2] || slots[1] == c[3];
  const bool direct = mask == kAllLanes && !crosses;
  const uint32_t* from[4];
  uint32_t* to[4];
  for (int i = 0; i < 4; ++i) {
    from[i] = warp.lanes<uint32_t>(c[i]);
    to[i] = direct ? warp.lanes<uint32_t>(slots[i]) : beside[i];
  }
  accumulate_half(blocks, 0, from, to);
  accumulate_half(blocks, 1, from + 2, to + 2);
  for (int i = 0; i < 4 && !direct; ++i) {
    const uint32_t* result = beside[i];
    write_lanes<uint32_t>(warp, slots[i], mask, [=](int lane) { return result[lane]; });
  }
  return Step::kNext;
}

template <MatrixType kA, MatrixType kB = kA>
Handler by_blocks(int blocks) {
  return blocks == 1 ? run_mma<kA, kB, 1> : run_mma<kA, kB, 2>;
}

Handler find_matrix(const MatrixForm& form) {
  using M = MatrixType;
  switch (form.a) {
    case M::kF16:
      return form.b == M::kF16 ? by_blocks<M::kF16>(form.k / 8) : nullptr;
    case M::kBf16:
      return form.b == M::kBf16 ? by_blocks<M::kBf16>(form.k / 8) : nullptr;
    case M::kTf32:
      return form.b == M::kTf32 ? by_blocks<M::kTf32>(form.k / 4) : nullptr;
    case M::kE4m3:
      return form.b == M::kE4m3   ? by_blocks<M::kE4m3>(form.k / 16)
             : form.b == M::kE5m2 ? by_blocks<M::kE4m3, M::kE5m2>(form.k / 16)
                                  : nullptr;
    case M::kE5m2:
      return form.b == M::kE5m2   ? by_blocks<M::kE5m2>(form.k / 16)
             : form.b == M::kE4m3 ? by_blocks<M::kE5m2, M::kE4m3>(form.k / 16)
                                  : nullptr;
    case M::kS8:
      return form.b == M::kS8   ? by_blocks<M::kS8>(form.k / 16)
             : form.b == M::kU8 ? by_blocks<M::kS8, M::kU8>(form.k / 16)
                                : nullptr;
    case M::kU8:
      return form.b == M::kU8   ? by_blocks<M::kU8>(form.k / 16)
             : form.b == M::kS8 ? by_blocks<M::kU8, M::kS8>(form.k / 16)
                                : nullptr;
  }
  return nullptr;
}
