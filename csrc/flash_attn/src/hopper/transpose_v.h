// V of 8 bits: wgmma wants the sums of P V, which run over keys, along rows of V's tile, and TMA
// brings them as columns.
#pragma once

#include "base/ptx/math.h"
#include "base/ptx/shared_memory.h"
#include "base/ptx/special_registers.h"
#include "hopper/smem.h"

namespace flash::hopper {

// Transposes a slot of V in place, keys in the order of column_of_key. A tile of V is a row or a
// column of squares, of as many keys as a group has columns; so is its transpose. A warp takes two
// blocks of a square, 16 keys and 16 columns each, that trade places, and moves both at once:
// inspector `inspector` of kInspectors its share of them. Its lanes read and write the slot.
template <FwdConfig C>
FLASH_DEVICE void transpose_v(char* slot, int inspector) {
  using V = typename SmemPlan<C>::V;
  constexpr int kSide = V::kGroupCols, kBlocks = kSide / 16;  // of a square: keys, blocks
  constexpr int kSquares = V::kBytes / (kSide * kSide);
  static_assert(V::kRowBytes == kSide);
  constexpr int kRow = 16 * kSide;  // bytes of a row of blocks
  const int lane = ptx::read_tid_x() % 32, row = lane % 8;
  // Lanes 0 to 15 address one of the blocks, the others the second: eight keys, then the eight
  // behind. What a lane gets of both is four keys of two neighbouring columns, rows of V
  // transposed: those of even columns make one matrix and those of odd ones another, but for the
  // fifth row on the other way round, or rows would share banks.
  const int half = lane / 8 % 2, between = half ^ row / 4;
  const uint32_t read = V::offset(half * 8 + row, 0), write = V::offset(2 * row + between, 0);
  const uint32_t evens = lane / 4 < 4 ? 0x6420 : 0x7531, odds = evens ^ 0x6420 ^ 0x7531;
#pragma unroll 1
  for (int i = inspector; i < kSquares * kBlocks; i += kInspectors) {
    const uint32_t square = ptx::shared_address(slot) + i / kBlocks * (kSide * kSide);
    // Blocks (a, a ^ distance), which trade places with (a ^ distance, a); on the diagonal there
    // are two for a warp too. Bits of a row and of a column of blocks are apart in an address.
    const int distance = i % kBlocks;
    const int flip = distance == 0 ? 1 : distance;
    const int own = lane < 16 ? 0 : flip;
    const uint32_t from = read ^ (own * (kRow + 16) ^ distance * 16);
    const uint32_t to = write ^ (own * (kRow + 16) ^ distance * kRow);
    const auto place = [=](int y) {  // those without the lowest bit of `flip`
      return static_cast<uint32_t>((y + (y & -(flip & -flip))) * (kRow + 16));
    };
    uint32_t r[kBlocks / 2][4];
#pragma unroll
    for (int y = 0; y < kBlocks / 2; ++y)
      ptx::ldmatrix_x4_trans<0>(r[y], square + (from ^ place(y)));
    __syncwarp();  // all lanes have read what others write to
#pragma unroll
    for (int y = 0; y < kBlocks / 2; ++y) {
      const uint32_t(&x)[4] = r[y];
      const uint32_t t[4] = {ptx::prmt(x[0], x[1], evens), ptx::prmt(x[0], x[1], odds),
                             ptx::prmt(x[2], x[3], evens), ptx::prmt(x[2], x[3], odds)};
      ptx::stmatrix_x4<0>(square + (to ^ place(y)), t);
    }
  }
}

}  // namespace flash::hopper
