#pragma once

// The swizzled layouts of shared memory that TMA and wgmma share (PTX 5.5.6 "Swizzling modes",
// 9.7.15.5.1 "Shared memory matrix layout"): the 16-byte chunk within a row of 32, 64 or 128 bytes
// is exchanged by the low bits of the address of its 128-byte line.

#include <cstdint>

namespace gpu_emulator::exec {

// width: 0 (none), 32, 64 or 128 bytes. line_offset: subtracted from the line's number, see
// MatrixDescriptor::base_offset.
inline uint32_t swizzled(uint32_t address, uint32_t width, uint32_t line_offset = 0) {
  if (width == 0) return address;
  const uint32_t line = ((address >> 7) - line_offset) & (width / 16 - 1);
  return address ^ line << 4;
}

}  // namespace gpu_emulator::exec
