#include "wgmma_operand.h"

#include "swizzle.h"

namespace gpu_emulator::exec {
namespace {

constexpr uint32_t kChunkBytes = 16;
constexpr int kChunkElements = 8;  // of 16 bits

// Without a swizzle both orders consist of core matrices of 8 x 16 contiguous bytes. Elements of
// a core matrix's 16 bytes run along K or along M/N; either way `row` counts along M/N and `k`
// along K in units of core matrices.
uint32_t k_major(const MatrixDescriptor& matrix, int row, int half) {
  const uint32_t group = row / 8, in_group = row % 8;
  uint32_t address = matrix.start + group * matrix.stride_offset;
  if (matrix.swizzle == 0) {
    return address + in_group * kChunkBytes + half * matrix.leading_offset;
  }
  address += in_group * matrix.swizzle + half * kChunkBytes;
  return swizzled(address, matrix.swizzle, matrix.base_offset);
}

uint32_t mn_major(const MatrixDescriptor& matrix, int row_chunk, int k) {
  const uint32_t group = k / 8, in_group = k % 8;
  if (matrix.swizzle == 0) {
    return matrix.start + row_chunk * matrix.stride_offset + in_group * kChunkBytes +
           group * matrix.leading_offset;
  }
  const int chunks = static_cast<int>(matrix.swizzle / kChunkBytes);  // contiguous ones
  const uint32_t address = matrix.start + row_chunk % chunks * kChunkBytes +
                           row_chunk / chunks * matrix.leading_offset + in_group * matrix.swizzle +
                           group * matrix.stride_offset;
  return swizzled(address, matrix.swizzle, matrix.base_offset);
}

}  // namespace

MatrixDescriptor matrix_descriptor(uint64_t bits) {
  auto field = [&](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; };
  constexpr uint32_t kSwizzle[] = {0, 128, 64, 32};
  MatrixDescriptor matrix;
  matrix.start = field(0);
  matrix.leading_offset = field(16);
  matrix.stride_offset = field(32);
  matrix.base_offset = static_cast<uint32_t>(bits >> 49 & 7);
  matrix.swizzle = kSwizzle[bits >> 62];
  return matrix;
}

int operand_chunks(const MatrixDescriptor& matrix, bool is_mn_major, int first_row, int rows,
                   uint32_t* address) {
  constexpr int kHalves = 2;
  int count = 0;
  if (!is_mn_major) {
    for (int row = first_row; row < first_row + rows; ++row) {
      for (int half = 0; half < kHalves; ++half) address[count++] = k_major(matrix, row, half);
    }
    return count;
  }
  for (int k = 0; k < kHalves * kChunkElements; ++k) {
    for (int row = first_row; row < first_row + rows; row += kChunkElements) {
      address[count++] = mn_major(matrix, row / kChunkElements, k);
    }
  }
  return count;
}

}  // namespace gpu_emulator::exec
