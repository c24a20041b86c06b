#pragma once

// Addresses of instructions that have several: each is two slots of the instruction's list, a base
// and a constant offset.

#include "decode.h"
#include "memory.h"
#include "warp.h"

namespace gpu_emulator::exec {

// Appends [base + offset]; bit `index` of *wide: whether the base has 64 bits.
inline void append_address(Decoder& decoder, const ptx::Operand& operand, int index,
                           std::vector<Slot>& slots, uint8_t* wide) {
  const Decoder::Address address = decoder.address(operand);
  slots.push_back(address.slot);
  slots.push_back(decoder.function.constant(static_cast<uint64_t>(address.offset), 8));
  if (address.wide) *wide |= static_cast<uint8_t>(1 << index);
}

// Address `index` of those at the beginning of the list.
inline uint64_t listed_address(const Warp& warp, const Instruction& in, int index, uint8_t wide,
                               int lane) {
  const Slot* slots = warp.list(in) + 2 * index;
  const uint64_t offset = warp.lanes<uint64_t>(slots[1])[lane];
  if (wide >> index & 1) return warp.lanes<uint64_t>(slots[0])[lane] + offset;
  return static_cast<uint32_t>(warp.lanes<uint32_t>(slots[0])[lane] + offset);
}

}  // namespace gpu_emulator::exec
