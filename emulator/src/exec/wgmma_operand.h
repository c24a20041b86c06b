#pragma once

// Where wgmma finds its operands in shared memory (PTX 9.7.15.5.1).

#include <cstdint>

namespace gpu_emulator::exec {

// The matrix descriptor, in bytes.
struct MatrixDescriptor {
  uint32_t start = 0;
  uint32_t leading_offset = 0, stride_offset = 0;
  // Of a swizzled matrix whose pattern begins at an address that is not a multiple of 8 lines:
  // that address's line number modulo 8.
  uint32_t base_offset = 0;
  uint32_t swizzle = 0;  // 0, 32, 64, 128 bytes
};
MatrixDescriptor matrix_descriptor(uint64_t bits);

inline constexpr int kMaxChunks = 512;  // of one operand

// Shared addresses (offsets of the CTA) of the 16-byte chunks that hold `rows` rows, from first_row
// on, along M or N and the 32 bytes of K of one wgmma; rows and first_row are multiples of 8.
//   K-major    chunk 2 r + h holds half h of the K values of row first_row + r
//   MN-major   chunk k rows / 8 + r holds rows first_row + 8 r ... of K value k (16-bit elements)
// Returns their number.
int operand_chunks(const MatrixDescriptor& matrix, bool mn_major, int first_row, int rows,
                   uint32_t* address);

}  // namespace gpu_emulator::exec
