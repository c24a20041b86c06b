#pragma once

// Operands of asynchronous copies: addresses, two slots each (a base and a constant offset) at the
// beginning of the instruction's list. Of cp.async.bulk and cp.async.bulk.tensor three of them and
// the CTA mask of a multicast.

#include <vector>

#include "bulk_copy.h"
#include "decode.h"
#include "warp.h"

namespace gpu_emulator::exec {

inline constexpr int kBarrierPlace = 2;  // of the mbarrier among the three addresses
inline constexpr int kCtaMask = 6;       // in the list; kNoSlot: no multicast

void append_address(Decoder& decoder, const ptx::Operand& operand, int index,
                    std::vector<Slot>& slots);
// Three addresses, null: not there; then the mask, null: no multicast.
void append_places(Decoder& decoder, const ptx::Operand* const (&places)[3],
                   const ptx::Operand* cta_mask, std::vector<Slot>& slots);
ReductionOp take_reduction(Decoder& decoder);  // Unsupported if there is none

uint64_t listed_address(const Warp& warp, const Instruction& in, int index, int lane);

// The copy's destination and mbarrier, or where there is a CTA mask, the same offsets in each of
// its CTAs.
void set_destinations(const Instruction& in, uint64_t destination, BulkCopy& copy);

}  // namespace gpu_emulator::exec
