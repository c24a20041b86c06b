// Matrix products of wgmma. Included by isa_*.cpp in the namespace of one instruction set after
// lanes.inc.h and matrix.inc.h, whose vectors and conversions it uses.
//
// Operands are widened once into panels of 32-bit elements; the accumulators stay in the layout of
// the registers (PTX 9.7.15.5, figure "D fragment"): with g = lane / 4 and t = lane % 4, registers
// 4 j ... 4 j + 3 of 32 bits hold (row g, column 8 j + 2 t), (g, 8 j + 2 t + 1), (g + 8, 8 j + 2 t)
// and (g + 8, 8 j + 2 t + 1). So 32 lanes are 8 rows of 4 columns, even ones or odd ones:
//   panel of A   [k][16 rows][4 times the same value]
//   panel of B   [n / 8][k][4 even columns, then 4 odd ones]
// and a vector of A times a vector of 4 columns, repeated, needs no other shuffle.

inline constexpr int kTileRows = 16;  // of one warp
inline constexpr int kPanelRow = 4 * kTileRows;

template <MatrixType kType>
inline constexpr bool kIsInteger = kType == MatrixType::kS8 || kType == MatrixType::kU8;
template <MatrixType kType>
using PanelElement = std::conditional_t<kIsInteger<kType>, int32_t, float>;
template <MatrixType kType>
inline constexpr int kChunkElements =  // in 16 bytes
    kType == MatrixType::kTf32                                ? 4
    : kType == MatrixType::kF16 || kType == MatrixType::kBf16 ? 8
                                                              : 16;

template <MatrixType kType>
inline void widen_chunk(const std::byte* chunk, PanelElement<kType>* out) {
  constexpr int kCount = kChunkElements<kType>;
  if constexpr (kCount == 4) {
    uint32_t in[kCount];
    __builtin_memcpy(in, chunk, sizeof(in));
    for (int i = 0; i < kCount; ++i) out[i] = __builtin_bit_cast(float, in[i] & 0xffffe000u);
  } else if constexpr (kCount == 8) {
    uint16_t in[kCount];
    __builtin_memcpy(in, chunk, sizeof(in));
    for (int i = 0; i < kCount; ++i) {
      const uint32_t bits = in[i];
      out[i] = kType == MatrixType::kBf16 ? __builtin_bit_cast(float, bits << 16) : f16_value(bits);
    }
  } else {
    uint8_t in[kCount];
    __builtin_memcpy(in, chunk, sizeof(in));
    if constexpr (kType == MatrixType::kS8) {
      for (int i = 0; i < kCount; ++i) out[i] = static_cast<int8_t>(in[i]);
    } else if constexpr (kType == MatrixType::kU8) {
      for (int i = 0; i < kCount; ++i) out[i] = in[i];
    } else {
      static constexpr Fp8Table<kType> kTable;
      for (int i = 0; i < kCount; ++i) out[i] = kTable.value[in[i]];
    }
  }
}

template <class T>
struct EightOf;
template <>
struct EightOf<float> {
  using type = float __attribute__((vector_size(32), may_alias));
};
template <>
struct EightOf<int32_t> {
  using type = int32_t __attribute__((vector_size(32), may_alias));
};
template <class T>
using Eight = typename EightOf<T>::type;

// rows[r][k] to columns[k][r], both 8 x 8.
template <class T>
inline void transpose(const Eight<T> (&rows)[8], Eight<T> (&columns)[8]) {
  using V = Eight<T>;
  V pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shufflevector(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const V low = pairs[i + j], high = pairs[i + j + 2];
      quads[i + 2 * j] = __builtin_shufflevector(low, high, 0, 1, 8, 9, 4, 5, 12, 13);
      quads[i + 2 * j + 1] = __builtin_shufflevector(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    columns[i] = __builtin_shufflevector(quads[i], quads[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    columns[i + 4] = __builtin_shufflevector(quads[i], quads[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// Calls store(block, k, the 8 rows of the block) for every block of 8 rows and every k; chunks are
// in the order of operand_chunks().
template <MatrixType kType, class Store>
inline void for_each_column(const std::byte* const* chunks, const PanelForm& form, Store store) {
  using T = PanelElement<kType>;
  constexpr int kCount = kChunkElements<kType>, kDepth = 2 * kCount;
  const int blocks = form.rows / 8;
  for (int block = 0; block < blocks; ++block) {
    if (form.mn_major) {
      if constexpr (kCount == 8) {
        for (int k = 0; k < kDepth; ++k) {
          Eight<T> column;
          widen_chunk<kType>(chunks[k * blocks + block], reinterpret_cast<T*>(&column));
          store(block, k, form.negate ? -column : column);
        }
      }
      continue;
    }
    alignas(32) T values[8][kDepth];
    for (int i = 0; i < 16; ++i) {
      widen_chunk<kType>(chunks[16 * block + i], values[i / 2] + i % 2 * kCount);
    }
    for (int k = 0; k < kDepth; k += 8) {
      Eight<T> rows[8], columns[8];
      for (int r = 0; r < 8; ++r) rows[r] = *reinterpret_cast<const Eight<T>*>(values[r] + k);
      transpose<T>(rows, columns);
      for (int i = 0; i < 8; ++i) store(block, k + i, form.negate ? -columns[i] : columns[i]);
    }
  }
}

template <MatrixType kType>
void pack_a(const std::byte* const* chunks, const PanelForm& form, void* panel) {
  using T = PanelElement<kType>;
  using V = Eight<T>;
  auto* out = static_cast<T*>(panel);
  for_each_column<kType>(chunks, form, [=](int block, int k, V x) {
    auto* to = reinterpret_cast<V*>(out + k * kPanelRow + 32 * block);
    to[0] = __builtin_shufflevector(x, x, 0, 0, 0, 0, 1, 1, 1, 1);
    to[1] = __builtin_shufflevector(x, x, 2, 2, 2, 2, 3, 3, 3, 3);
    to[2] = __builtin_shufflevector(x, x, 4, 4, 4, 4, 5, 5, 5, 5);
    to[3] = __builtin_shufflevector(x, x, 6, 6, 6, 6, 7, 7, 7, 7);
  });
}

template <MatrixType kType>
void pack_b(const std::byte* const* chunks, const PanelForm& form, void* panel) {
  using T = PanelElement<kType>;
  using V = Eight<T>;
  constexpr int kDepth = 2 * kChunkElements<kType>;
  auto* out = static_cast<T*>(panel);
  for_each_column<kType>(chunks, form, [=](int block, int k, V x) {
    *reinterpret_cast<V*>(out + (block * kDepth + k) * 8) =
        __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7);
  });
}

// Halves of the tile's rows that are summed together: as many as give 8 vectors or more, which hide
// the latency of a multiply-add.
inline constexpr int kHalves = GPU_EMULATOR_VECTOR_BYTES == 64 ? 2 : 1;

// Adds to columns 8 j ... 8 j + 7 the product of k columns of A with the panel of B at b.
template <class T>
inline void multiply_block(T* const* c, const T* a, const T* b, int k) {
  using V = typename VectorOf<T>::type;
  constexpr int kCount = kHalves * kVectors;
  for (int half = 0; half < 2; half += kHalves) {
    V even[kCount], odd[kCount];
    for (int i = 0; i < kCount; ++i) {
      const int reg = 2 * (half + i / kVectors), lane = i % kVectors * kVectorLanes;
      even[i] = *reinterpret_cast<const V*>(c[reg] + lane);
      odd[i] = *reinterpret_cast<const V*>(c[reg + 1] + lane);
    }
    const T* column = a + half * kWarpSize;
    for (int step = 0; step < k; ++step, column += kPanelRow) {
      const V b_even = repeat_quad(b + 8 * step);
      const V b_odd = repeat_quad(b + 8 * step + 4);
      for (int i = 0; i < kCount; ++i) {
        const V x = *reinterpret_cast<const V*>(column + i * kVectorLanes);
        even[i] = multiply_add(x, b_even, even[i]);
        odd[i] = multiply_add(x, b_odd, odd[i]);
      }
    }
    for (int i = 0; i < kCount; ++i) {
      const int reg = 2 * (half + i / kVectors), lane = i % kVectors * kVectorLanes;
      *reinterpret_cast<V*>(c[reg] + lane) = even[i];
      *reinterpret_cast<V*>(c[reg + 1] + lane) = odd[i];
    }
  }
}

inline void clear(uint32_t* reg) {
  for (int i = 0; i < kWarpSize; ++i) reg[i] = 0;
}

void multiply_f32(uint32_t* const* d, const TilePanels& panels, bool accumulate) {
  const auto* a = static_cast<const float*>(panels.a);
  const auto* b = static_cast<const float*>(panels.b);
  for (int j = 0; j < panels.n / 8; ++j) {
    float* c[4];
    for (int i = 0; i < 4; ++i) {
      if (!accumulate) clear(d[4 * j + i]);
      c[i] = reinterpret_cast<float*>(d[4 * j + i]);
    }
    multiply_block(c, a, b + j * panels.k * 8, panels.k);
  }
}

// Two columns a register; summed in fp32 and rounded once.
void multiply_f16(uint32_t* const* d, const TilePanels& panels, bool accumulate) {
  const auto* a = static_cast<const float*>(panels.a);
  const auto* b = static_cast<const float*>(panels.b);
  alignas(64) float sums[4][kWarpSize];
  float* const c[4] = {sums[0], sums[1], sums[2], sums[3]};
  for (int j = 0; j < panels.n / 8; ++j) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t* reg = d[2 * j + half];
      for (int i = 0; i < kWarpSize; ++i) {
        const uint32_t packed = accumulate ? reg[i] : 0;
        sums[2 * half][i] = f16_value(packed & 0xffff);
        sums[2 * half + 1][i] = f16_value(packed >> 16);
      }
    }
    multiply_block(c, a, b + j * panels.k * 8, panels.k);
    for (int half = 0; half < 2; ++half) {
      uint32_t* reg = d[2 * j + half];
      for (int i = 0; i < kWarpSize; ++i) {
        reg[i] = f16_bits(sums[2 * half + 1][i]) << 16 | f16_bits(sums[2 * half][i]);
      }
    }
  }
}

// The products' sum never overflows; adding it to the accumulator wraps, or saturates.
template <bool kSaturate>
void multiply_s32(uint32_t* const* d, const TilePanels& panels, bool accumulate) {
  const auto* a = static_cast<const int32_t*>(panels.a);
  const auto* b = static_cast<const int32_t*>(panels.b);
  alignas(64) int32_t sums[4][kWarpSize];
  int32_t* const c[4] = {sums[0], sums[1], sums[2], sums[3]};
  for (int j = 0; j < panels.n / 8; ++j) {
    __builtin_memset(sums, 0, sizeof(sums));
    multiply_block(c, a, b + j * panels.k * 8, panels.k);
    for (int r = 0; r < 4; ++r) {
      uint32_t* reg = d[4 * j + r];
      for (int i = 0; i < kWarpSize; ++i) {
        const uint32_t before = accumulate ? reg[i] : 0;
        if constexpr (kSaturate) {
          int64_t sum = int64_t{static_cast<int32_t>(before)} + sums[r][i];
          sum = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
          reg[i] = static_cast<uint32_t>(sum);
        } else {
          reg[i] = before + static_cast<uint32_t>(sums[r][i]);
        }
      }
    }
  }
}

PackPanel find_pack_a(MatrixType type) {
  constexpr PackPanel kTable[] = {pack_a<MatrixType::kF16>,  pack_a<MatrixType::kBf16>,
                                  pack_a<MatrixType::kTf32>, pack_a<MatrixType::kE4m3>,
                                  pack_a<MatrixType::kE5m2>, pack_a<MatrixType::kS8>,
                                  pack_a<MatrixType::kU8>};
  return kTable[static_cast<int>(type)];
}

PackPanel find_pack_b(MatrixType type) {
  constexpr PackPanel kTable[] = {pack_b<MatrixType::kF16>,  pack_b<MatrixType::kBf16>,
                                  pack_b<MatrixType::kTf32>, pack_b<MatrixType::kE4m3>,
                                  pack_b<MatrixType::kE5m2>, pack_b<MatrixType::kS8>,
                                  pack_b<MatrixType::kU8>};
  return kTable[static_cast<int>(type)];
}

TileProduct find_tile_product(AccumulatorType type) {
  constexpr TileProduct kTable[] = {multiply_f32, multiply_f16, multiply_s32<false>,
                                    multiply_s32<true>};
  return kTable[static_cast<int>(type)];
}
