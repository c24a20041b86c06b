// Products of tiles in shared memory: a warp's accumulators += A B, with operands that lie either
// way.
#pragma once

#include <cstdint>

#include "base/ptx/fragments.h"
#include "base/ptx/mma.h"
#include "base/ptx/shared_memory.h"
#include "base/static_for.h"
#include "warp/smem_tile.h"

namespace flash::sm80 {

// A warp's accumulators of kM m16 tiles and kN n8 tiles (fragments.h: accumulator_element).
template <int kM, int kN>
using Accumulators = float[kM][kN][4];

template <int kM, int kN>
FLASH_DEVICE void clear(Accumulators<kM, kN>& r) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) r[m][n][i] = 0.f;
}

// An operand whose sums run along the rows of a tile: block i of 16 rows, 16 columns k of the sum.
// `lane` is this lane's address in the first block: of A by ptx::a_chunk, of B by b_chunk_n_major.
template <class Smem>
struct SumAlongRows {
  uint32_t lane;

  template <int kSum, int kBlock>
  FLASH_DEVICE void load(uint32_t (&r)[4]) const {
    ptx::ldmatrix_x4<kBlock * 16 * Smem::kRowBytes + Smem::ahead(kSum)>(r, lane ^ Smem::flip(kSum));
  }
};

// One whose sums run down the columns: 16 rows k of the sum, every kStep-th block of 16 columns
// from the first, a number below kStep, on. `lane`: of A by ptx::a_chunk_k_major, of B by
// b_chunk_k_major.
template <class Smem, int kStep>
struct SumDownColumns {
  uint32_t lane;

  template <int kSum, int kBlock>
  FLASH_DEVICE void load(uint32_t (&r)[4]) const {
    constexpr int kColumns = kBlock * kStep;
    ptx::ldmatrix_x4_trans<kSum * 16 * Smem::kRowBytes + Smem::ahead(kColumns)>(
        r, lane ^ Smem::flip(kColumns));
  }
};

// r += A B over kSums * 16 elements.
template <Dtype kDtype, int kSums, int kM, int kN, class A, class B>
FLASH_DEVICE void gemm(Accumulators<kM, kN>& r, const A& a, const B& b) {
  static_for<kSums>([&](auto k) {
    uint32_t rA[kM][4];
    static_for<kM>([&](auto m) { a.template load<k, m>(rA[m]); });
    static_for<kN / 2>([&](auto n) {
      uint32_t rB[4];
      b.template load<k, n>(rB);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_m16n8k16<kDtype>(r[m][2 * n], rA[m], rB[0], rB[1]);
        ptx::mma_m16n8k16<kDtype>(r[m][2 * n + 1], rA[m], rB[2], rB[3]);
      }
    });
  });
}

}  // namespace flash::sm80
