// The tensor core of sm_90: products of 64 x N tiles by a warpgroup, asynchronously (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Instructions: wgmma"). Operands are fp16, bf16 or e4m3, B
// and sometimes A in shared memory, the accumulators fp32 in registers: warp w of the warpgroup has
// rows 16 w .. 16 w + 15, its N / 8 tiles of 8 columns each lie as those of mma.m16n8k16
// (fragments.h: accumulator_element), and so does A in registers (a_element; a_element_8_bits).
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "base/host_device.h"

namespace flash::ptx {

// A matrix in shared memory (PTX ISA, "Matrix Descriptor Format").
struct WgmmaMatrix {
  uint32_t low, high;  // of the descriptor

  FLASH_DEVICE uint64_t descriptor() const { return uint64_t{high} << 32 | low; }
  // What lies `bytes` further on, a multiple of 16.
  FLASH_DEVICE WgmmaMatrix operator+(int bytes) const { return {low + (bytes >> 4), high}; }
};

// One whose rows are swizzled as TMA does it by kSwizzle, 128 or 64, bytes (PTX ISA, "Shared Memory
// Matrix Layout"). Consecutive rows are kSwizzle bytes apart; `address` is a multiple of 16, the
// rows' pattern begins at a multiple of 8 kSwizzle. `leading` is of consequence where sums run down
// the columns: the distance of the groups of kSwizzle bytes that a row is cut into.
template <int kSwizzle>
FLASH_DEVICE WgmmaMatrix wgmma_matrix(uint32_t address, int leading = 16) {
  static_assert(kSwizzle == 128 || kSwizzle == 64);
  constexpr uint32_t kCode = kSwizzle == 128 ? 1 : 2;
  constexpr uint32_t kEightRows = 8 * kSwizzle;
  return {(address & 0x3ffffu) >> 4 | static_cast<uint32_t>(leading >> 4) << 16,
          kEightRows >> 4 | kCode << 30};
}

// wgmma.fence: orders accesses to registers before the wgmma that follow.
FLASH_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group: this warpgroup's wgmma since the last one form a group.
FLASH_DEVICE void wgmma_commit_group() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// wgmma.wait_group: waits until at most kPending of the latest groups are under way.
template <int kPending>
FLASH_DEVICE void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Accumulators that change here as far as the compiler knows: it moves no access to them across.
template <int kTiles>
FLASH_DEVICE void wgmma_keep_in_order(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[n][i])::"memory");
}

// The text of 8 accumulators, from the first on, and the same as operands.
#define FLASH_WGMMA_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FLASH_WGMMA_16 \
  FLASH_WGMMA_8        \
  ", "                 \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define FLASH_WGMMA_24 \
  FLASH_WGMMA_16       \
  ", "                 \
  "%16, %17, %18, %19, %20, %21, %22, %23"
#define FLASH_WGMMA_32 \
  FLASH_WGMMA_24       \
  ", "                 \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FLASH_WGMMA_40 \
  FLASH_WGMMA_32       \
  ", "                 \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define FLASH_WGMMA_48 \
  FLASH_WGMMA_40       \
  ", "                 \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define FLASH_WGMMA_56 \
  FLASH_WGMMA_48       \
  ", "                 \
  "%48, %49, %50, %51, %52, %53, %54, %55"
#define FLASH_WGMMA_64 \
  FLASH_WGMMA_56       \
  ", "                 \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define FLASH_WGMMA_72 \
  FLASH_WGMMA_64       \
  ", "                 \
  "%64, %65, %66, %67, %68, %69, %70, %71"
#define FLASH_WGMMA_80 \
  FLASH_WGMMA_72       \
  ", "                 \
  "%72, %73, %74, %75, %76, %77, %78, %79"
#define FLASH_WGMMA_88 \
  FLASH_WGMMA_80       \
  ", "                 \
  "%80, %81, %82, %83, %84, %85, %86, %87"
#define FLASH_WGMMA_96 \
  FLASH_WGMMA_88       \
  ", "                 \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define FLASH_WGMMA_104 \
  FLASH_WGMMA_96        \
  ", "                  \
  "%96, %97, %98, %99, %100, %101, %102, %103"
#define FLASH_WGMMA_112 \
  FLASH_WGMMA_104       \
  ", "                  \
  "%104, %105, %106, %107, %108, %109, %110, %111"
#define FLASH_WGMMA_120 \
  FLASH_WGMMA_112       \
  ", "                  \
  "%112, %113, %114, %115, %116, %117, %118, %119"
#define FLASH_WGMMA_128 \
  FLASH_WGMMA_120       \
  ", "                  \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define FLASH_WGMMA_TILE(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define FLASH_WGMMA_OPERANDS_8 FLASH_WGMMA_TILE(0), FLASH_WGMMA_TILE(1)
#define FLASH_WGMMA_OPERANDS_16 FLASH_WGMMA_OPERANDS_8, FLASH_WGMMA_TILE(2), FLASH_WGMMA_TILE(3)
#define FLASH_WGMMA_OPERANDS_24 FLASH_WGMMA_OPERANDS_16, FLASH_WGMMA_TILE(4), FLASH_WGMMA_TILE(5)
#define FLASH_WGMMA_OPERANDS_32 FLASH_WGMMA_OPERANDS_24, FLASH_WGMMA_TILE(6), FLASH_WGMMA_TILE(7)
#define FLASH_WGMMA_OPERANDS_40 FLASH_WGMMA_OPERANDS_32, FLASH_WGMMA_TILE(8), FLASH_WGMMA_TILE(9)
#define FLASH_WGMMA_OPERANDS_48 FLASH_WGMMA_OPERANDS_40, FLASH_WGMMA_TILE(10), FLASH_WGMMA_TILE(11)
#define FLASH_WGMMA_OPERANDS_56 FLASH_WGMMA_OPERANDS_48, FLASH_WGMMA_TILE(12), FLASH_WGMMA_TILE(13)
#define FLASH_WGMMA_OPERANDS_64 FLASH_WGMMA_OPERANDS_56, FLASH_WGMMA_TILE(14), FLASH_WGMMA_TILE(15)
#define FLASH_WGMMA_OPERANDS_72 FLASH_WGMMA_OPERANDS_64, FLASH_WGMMA_TILE(16), FLASH_WGMMA_TILE(17)
#define FLASH_WGMMA_OPERANDS_80 FLASH_WGMMA_OPERANDS_72, FLASH_WGMMA_TILE(18), FLASH_WGMMA_TILE(19)
#define FLASH_WGMMA_OPERANDS_88 FLASH_WGMMA_OPERANDS_80, FLASH_WGMMA_TILE(20), FLASH_WGMMA_TILE(21)
#define FLASH_WGMMA_OPERANDS_96 FLASH_WGMMA_OPERANDS_88, FLASH_WGMMA_TILE(22), FLASH_WGMMA_TILE(23)
#define FLASH_WGMMA_OPERANDS_104 FLASH_WGMMA_OPERANDS_96, FLASH_WGMMA_TILE(24), FLASH_WGMMA_TILE(25)
#define FLASH_WGMMA_OPERANDS_112 \
  FLASH_WGMMA_OPERANDS_104, FLASH_WGMMA_TILE(26), FLASH_WGMMA_TILE(27)
#define FLASH_WGMMA_OPERANDS_120 \
  FLASH_WGMMA_OPERANDS_112, FLASH_WGMMA_TILE(28), FLASH_WGMMA_TILE(29)
#define FLASH_WGMMA_OPERANDS_128 \
  FLASH_WGMMA_OPERANDS_120, FLASH_WGMMA_TILE(30), FLASH_WGMMA_TILE(31)

// For N columns of R = N / 2 accumulators: D += A B with A from shared memory, where sums run along
// rows of A and B, or down the columns of those that are transposed (1); and with A in registers
// and sums down the columns of B. The numbers of the operands behind the accumulators follow R.
#define FLASH_WGMMA_SHAPE(N, R, R1, R2, R3, R4, TYPES)                                         \
  template <int kTransposeA, int kTransposeB>                                                  \
  FLASH_DEVICE void wgmma_ss_##TYPES(float(&d)[N / 8][4], uint64_t a, uint64_t b, int add) {   \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #R2                                    \
                 ", 0;\n"                                                                      \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPES "." #TYPES          \
                 " {" FLASH_WGMMA_##R "}, %" #R ", %" #R1 ", p, 1, 1, %" #R3 ", %" #R4 ";\n}"  \
                 : FLASH_WGMMA_OPERANDS_##R                                                    \
                 : "l"(a), "l"(b), "r"(add), "n"(kTransposeA), "n"(kTransposeB));              \
  }                                                                                            \
  FLASH_DEVICE void wgmma_rs_##TYPES(float(&d)[N / 8][4], const uint32_t(&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #TYPES "." #TYPES           \
                 " {" FLASH_WGMMA_##R "}, {%" #R ", %" #R1 ", %" #R2 ", %" #R3 "}, %" #R4      \
                                      ", 1, 1, 1, 1;\n"                                        \
                 : FLASH_WGMMA_OPERANDS_##R                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                        \
  }
#define FLASH_WGMMA_SHAPES(TYPES)                    \
  FLASH_WGMMA_SHAPE(16, 8, 9, 10, 11, 12, TYPES)     \
  FLASH_WGMMA_SHAPE(32, 16, 17, 18, 19, 20, TYPES)   \
  FLASH_WGMMA_SHAPE(64, 32, 33, 34, 35, 36, TYPES)   \
  FLASH_WGMMA_SHAPE(80, 40, 41, 42, 43, 44, TYPES)   \
  FLASH_WGMMA_SHAPE(96, 48, 49, 50, 51, 52, TYPES)   \
  FLASH_WGMMA_SHAPE(112, 56, 57, 58, 59, 60, TYPES)  \
  FLASH_WGMMA_SHAPE(128, 64, 65, 66, 67, 68, TYPES)  \
  FLASH_WGMMA_SHAPE(192, 96, 97, 98, 99, 100, TYPES) \
  FLASH_WGMMA_SHAPE(256, 128, 129, 130, 131, 132, TYPES)
FLASH_WGMMA_SHAPES(f16)
FLASH_WGMMA_SHAPES(bf16)

// The same of e4m3, whose sums run along the rows of both, with A in registers too.
#define FLASH_WGMMA_E4M3(N, R, R1, R2, R3, R4, R5)                                        \
  FLASH_DEVICE void wgmma_ss_e4m3(float(&d)[N / 8][4], uint64_t a, uint64_t b, int add) { \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #R2                               \
                 ", 0;\n"                                                                 \
                 " wgmma.mma_async.sync.aligned.m64n" #N                                  \
                 "k32.f32.e4m3.e4m3"                                                      \
                 " {" FLASH_WGMMA_##R "}, %" #R ", %" #R1 ", p, 1, 1;\n}"                 \
                 : FLASH_WGMMA_OPERANDS_##R                                               \
                 : "l"(a), "l"(b), "r"(add));                                             \
  }                                                                                       \
  FLASH_DEVICE void wgmma_rs_e4m3(float(&d)[N / 8][4], const uint32_t(&a)[4], uint64_t b, \
                                  int add) {                                              \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" #R5                               \
                 ", 0;\n"                                                                 \
                 " wgmma.mma_async.sync.aligned.m64n" #N                                  \
                 "k32.f32.e4m3.e4m3"                                                      \
                 " {" FLASH_WGMMA_##R "}, {%" #R ", %" #R1 ", %" #R2 ", %" #R3 "}, %" #R4 \
                                      ", p, 1, 1;\n}"                                     \
                 : FLASH_WGMMA_OPERANDS_##R                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));         \
  }
FLASH_WGMMA_E4M3(64, 32, 33, 34, 35, 36, 37)
FLASH_WGMMA_E4M3(128, 64, 65, 66, 67, 68, 69)
#undef FLASH_WGMMA_E4M3
#undef FLASH_WGMMA_SHAPES
#undef FLASH_WGMMA_SHAPE
#undef FLASH_WGMMA_OPERANDS_8
#undef FLASH_WGMMA_8
#undef FLASH_WGMMA_OPERANDS_16
#undef FLASH_WGMMA_16
#undef FLASH_WGMMA_OPERANDS_24
#undef FLASH_WGMMA_24
#undef FLASH_WGMMA_OPERANDS_32
#undef FLASH_WGMMA_32
#undef FLASH_WGMMA_OPERANDS_40
#undef FLASH_WGMMA_40
#undef FLASH_WGMMA_OPERANDS_48
#undef FLASH_WGMMA_48
#undef FLASH_WGMMA_OPERANDS_56
#undef FLASH_WGMMA_56
#undef FLASH_WGMMA_OPERANDS_64
#undef FLASH_WGMMA_64
#undef FLASH_WGMMA_OPERANDS_72
#undef FLASH_WGMMA_72
#undef FLASH_WGMMA_OPERANDS_80
#undef FLASH_WGMMA_80
#undef FLASH_WGMMA_OPERANDS_88
#undef FLASH_WGMMA_88
#undef FLASH_WGMMA_OPERANDS_96
#undef FLASH_WGMMA_96
#undef FLASH_WGMMA_OPERANDS_104
#undef FLASH_WGMMA_104
#undef FLASH_WGMMA_OPERANDS_112
#undef FLASH_WGMMA_112
#undef FLASH_WGMMA_OPERANDS_120
#undef FLASH_WGMMA_120
#undef FLASH_WGMMA_OPERANDS_128
#undef FLASH_WGMMA_128
#undef FLASH_WGMMA_TILE

// d += A B^T, or without `add` d = A B^T, of 32 bytes of both: they lie with their sums along rows.
// A transposed one's rows are the terms, of which there are 16: no fp8.
template <Dtype kDtype, bool kTransposeA = false, bool kTransposeB = false, int kTiles>
FLASH_DEVICE void wgmma_ss(float (&d)[kTiles][4], const WgmmaMatrix& a, const WgmmaMatrix& b,
                           bool add) {
  if constexpr (kDtype == Dtype::kFloat16) {
    wgmma_ss_f16<kTransposeA, kTransposeB>(d, a.descriptor(), b.descriptor(), add);
  } else if constexpr (kDtype == Dtype::kBFloat16) {
    wgmma_ss_bf16<kTransposeA, kTransposeB>(d, a.descriptor(), b.descriptor(), add);
  } else {
    static_assert(kDtype == Dtype::kFloat8E4M3 && !kTransposeA && !kTransposeB);
    wgmma_ss_e4m3(d, a.descriptor(), b.descriptor(), add);
  }
}

// d += A B of 16 rows of B, whose sums run down the columns.
template <Dtype kDtype, int kTiles>
FLASH_DEVICE void wgmma_rs(float (&d)[kTiles][4], const uint32_t (&a)[4], const WgmmaMatrix& b) {
  if constexpr (kDtype == Dtype::kFloat16) {
    wgmma_rs_f16(d, a, b.descriptor());
  } else {
    static_assert(kDtype == Dtype::kBFloat16);
    wgmma_rs_bf16(d, a, b.descriptor());
  }
}

// d += A B^T, or without `add` d = A B^T, of e4m3: A in registers, 32 columns of it and of B.
template <int kTiles>
FLASH_DEVICE void wgmma_rs_e4m3(float (&d)[kTiles][4], const uint32_t (&a)[4], const WgmmaMatrix& b,
                                bool add) {
  wgmma_rs_e4m3(d, a, b.descriptor(), add);
}

}  // namespace flash::ptx
