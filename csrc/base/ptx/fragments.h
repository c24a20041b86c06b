// Which element of a matrix each lane of a warp holds: mma.m16n8k16 with 16-bit operands and fp32
// accumulators (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"),
// and the rows that ldmatrix wants addressed to fetch them (PTX ISA, "Warp-level matrix load
// instruction: ldmatrix").
//
// Masks, epilogues and tests use these maps and know no other.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

struct Element {
  int row, col;
};

// The accumulator, 16 x 8 fp32: register i (0..3) of `lane`.
FLASH_INLINE constexpr Element accumulator_element(int lane, int i) {
  return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2};
}

// Operand A, 16 x 16, two elements a register: half h of register i (0..3).
FLASH_INLINE constexpr Element a_element(int lane, int i, int h) {
  return {lane / 4 + 8 * (i % 2), 2 * (lane % 4) + h + 8 * (i / 2)};
}

// Operand A of 8-bit elements, 16 x 32, four a register: byte b of register i (0..3) (PTX ISA,
// "Matrix Fragments for mma.m16n8k32").
FLASH_INLINE constexpr Element a_element_8_bits(int lane, int i, int b) {
  return {lane / 4 + 8 * (i % 2), 4 * (lane % 4) + b + 16 * (i / 2)};
}

// Operand B, 16 (k) x 8 (n), two elements a register: half h of register i (0..1).
FLASH_INLINE constexpr Element b_element(int lane, int i, int h) {
  return {2 * (lane % 4) + h + 8 * i, lane / 4};
}

// ldmatrix.x4 loads four 8 x 8 blocks; lane l gives the address of row l % 8 of block l / 8, and
// the block arrives in register l / 8. Below: that row, and its column in units of 8 elements (one
// 16-byte chunk), for a 16 x 16 block of shared memory.

struct Chunk {
  int row, chunk;
};

// Rows are A's rows and columns k: registers 0..3 are A's. Without .trans.
FLASH_INLINE constexpr Chunk a_chunk(int lane) { return {lane % 16, lane / 16}; }

// Rows are k and columns A's rows (A transposed, as dS lies for dS^T Q): registers 0..3 are A's.
// With .trans.
FLASH_INLINE constexpr Chunk a_chunk_k_major(int lane) {
  return {lane % 8 + 8 * (lane / 16), lane / 8 % 2};
}

// Rows are n and columns k (B transposed, as K lies): registers {0, 1} are B of n = 0..7, {2, 3} of
// n = 8..15. Without .trans.
FLASH_INLINE constexpr Chunk b_chunk_n_major(int lane) {
  return {lane % 8 + 8 * (lane / 16), lane / 8 % 2};
}

// Rows are k and columns n (B, as V lies): registers {0, 1} are B of n = 0..7, {2, 3} of n = 8..15.
// With .trans.
FLASH_INLINE constexpr Chunk b_chunk_k_major(int lane) { return {lane % 16, lane / 16}; }

}  // namespace flash::ptx
