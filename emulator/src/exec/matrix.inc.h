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
using V4F = float __attribute__((vector_size(16), may_alias));
using V4I = int32_t __attribute__((vector_size(16), may_alias));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VF;
  using quad = V4F;
};
template <>
struct VectorOf<int32_t> {
  using type = VI;
  using quad = V4I;
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
  return __builtin_shufflevector(x, x, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
#elif GPU_EMULATOR_VECTOR_BYTES == 32
  return __builtin_shufflevector(x, x, 0, 1, 2, 3, 0, 1, 2, 3);
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

// Lane (4 c + t) of `in` to out[t][c / 2 + 4 (c % 2)]: even columns, then odd ones.
template <class T>
inline void transpose_columns(const T* in, T out[4][8]) {
  for (int t = 0; t < 4; ++t) {
    for (int c = 0; c < 8; ++c) out[t][c / 2 + 4 * (c % 2)] = in[4 * c + t];
  }
}

template <class T, int kElements>
struct FragmentBuffers {                     // of 4 E values of k
  alignas(64) T a[2][kElements][kWarpSize];  // rows 0-7, 8-15
  alignas(64) T b[kElements][4][8];
};

template <int kQ, class T, int kElements>
inline void accumulate_quad(const FragmentBuffers<T, kElements>& f, int half,
                            typename VectorOf<T>::type (&even)[kVectors],
                            typename VectorOf<T>::type (&odd)[kVectors]) {
  using V = typename VectorOf<T>::type;
  for (int e = 0; e < kElements; ++e) {
    const V b_even = repeat_quad(&f.b[e][kQ][0]);
    const V b_odd = repeat_quad(&f.b[e][kQ][4]);
    for (int j = 0; j < kVectors; ++j) {
      const V raw = *reinterpret_cast<const V*>(&f.a[half][e][j * kVectorLanes]);
      const V a = splat_quad<kQ>(raw);
      even[j] = multiply_add(a, b_even, even[j]);
      odd[j] = multiply_add(a, b_odd, odd[j]);
    }
  }
}

template <MatrixType kA, MatrixType kB, int kBlocks>
Step run_mma(Warp& warp, const Instruction& in, uint32_t mask) {
  constexpr bool kInteger = kA == MatrixType::kS8 || kA == MatrixType::kU8;
  constexpr int kElements = kA == MatrixType::kTf32                             ? 1
                            : kA == MatrixType::kBf16 || kA == MatrixType::kF16 ? 2
                                                                                : 4;
  using T = std::conditional_t<kInteger, int32_t, float>;
  using V = typename VectorOf<T>::type;
  require_converged(warp, mask, "mma");
  const Slot* slots = warp.list(in);
  const Slot *d = slots, *a = slots + 4, *b = a + 2 * kBlocks, *c = b + kBlocks;
  FragmentBuffers<T, kElements> blocks[kBlocks];
  for (int block = 0; block < kBlocks; ++block) {
    for (int e = 0; e < kElements; ++e) {
      alignas(64) T column[kWarpSize];
      widen<kA>(warp.lanes<uint32_t>(a[2 * block]), e, blocks[block].a[0][e]);
      widen<kA>(warp.lanes<uint32_t>(a[2 * block + 1]), e, blocks[block].a[1][e]);
      widen<kB>(warp.lanes<uint32_t>(b[block]), e, column);
      transpose_columns(column, blocks[block].b[e]);
    }
  }
  alignas(64) uint32_t high_rows[2][kWarpSize];  // of C, which D may overwrite
  __builtin_memcpy(high_rows[0], warp.lanes<uint32_t>(c[2]), sizeof(high_rows[0]));
  __builtin_memcpy(high_rows[1], warp.lanes<uint32_t>(c[3]), sizeof(high_rows[1]));
  for (int half = 0; half < 2; ++half) {
    V even[kVectors], odd[kVectors];
    __builtin_memcpy(even, half ? high_rows[0] : warp.lanes<uint32_t>(c[0]), sizeof(even));
    __builtin_memcpy(odd, half ? high_rows[1] : warp.lanes<uint32_t>(c[1]), sizeof(odd));
    for (int block = 0; block < kBlocks; ++block) {
      accumulate_quad<0>(blocks[block], half, even, odd);
      accumulate_quad<1>(blocks[block], half, even, odd);
      accumulate_quad<2>(blocks[block], half, even, odd);
      accumulate_quad<3>(blocks[block], half, even, odd);
    }
    if (mask == kAllLanes) {
      __builtin_memcpy(warp.lanes<uint32_t>(d[2 * half]), even, sizeof(even));
      __builtin_memcpy(warp.lanes<uint32_t>(d[2 * half + 1]), odd, sizeof(odd));
    } else {
      const auto* e = reinterpret_cast<const uint32_t*>(even);
      const auto* o = reinterpret_cast<const uint32_t*>(odd);
      write_lanes<uint32_t>(warp, d[2 * half], mask, [=](int i) { return e[i]; });
      write_lanes<uint32_t>(warp, d[2 * half + 1], mask, [=](int i) { return o[i]; });
    }
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
