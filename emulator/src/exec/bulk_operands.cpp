#include "bulk_operands.h"

#include "function_decoder.h"
#include "report.h"

namespace gpu_emulator::exec {

void append_address(Decoder& decoder, const ptx::Operand& operand, int index,
                    std::vector<Slot>& slots) {
  const Decoder::Address address = decoder.address(operand);
  slots.push_back(address.slot);
  slots.push_back(decoder.function.constant(static_cast<uint64_t>(address.offset), 8));
  make_options<BulkOptions>(decoder.out).wide_bases |= static_cast<uint8_t>(address.wide << index);
}

void append_places(Decoder& decoder, const ptx::Operand* const (&places)[3],
                   const ptx::Operand* cta_mask, std::vector<Slot>& slots) {
  for (int i = 0; i < 3; ++i) {
    if (places[i]) {
      append_address(decoder, *places[i], i, slots);
    } else {
      slots.insert(slots.end(), 2, kNoSlot);
    }
  }
  slots.push_back(cta_mask ? decoder.source(*cta_mask, ptx::Type::kU16) : kNoSlot);
}

ReductionOp take_reduction(Decoder& decoder) {
  const int op = decoder.take_any({"add", "min", "max", "inc", "dec", "and", "or", "xor"});
  if (op < 0) throw Unsupported("reduction");
  return static_cast<ReductionOp>(op);
}

uint64_t listed_address(const Warp& warp, const Instruction& in, int index, int lane) {
  const Slot* slots = warp.list(in) + 2 * index;
  const uint64_t offset = warp.lanes<uint64_t>(slots[1])[lane];
  if (options<BulkOptions>(in).wide_bases >> index & 1)
    return warp.lanes<uint64_t>(slots[0])[lane] + offset;
  return static_cast<uint32_t>(warp.lanes<uint32_t>(slots[0])[lane] + offset);
}

void set_destinations(const Instruction& in, uint64_t destination, BulkCopy& copy) {
  const Warp& warp = *copy.site.warp;
  const int lane = copy.site.lane;
  const uint64_t barrier = listed_address(warp, in, kBarrierPlace, lane);
  const Slot mask_slot = warp.list(in)[kCtaMask];
  if (mask_slot == kNoSlot) {
    if (destination >> kSharedRankShift != barrier >> kSharedRankShift) {
      fail(warp, lane, ReportKind::kInvalidOperand,
           "The mbarrier is not in the shared memory of the destination's CTA.");
    }
    copy.destinations = {destination};
    copy.mbarriers = {barrier};
    return;
  }
  const uint32_t mask = warp.lanes<uint32_t>(mask_slot)[lane] & 0xffff;
  const size_t ctas = warp.cta->cluster->ctas.size();
  if (mask == 0 || mask >> ctas != 0) {
    fail(warp, lane, ReportKind::kInvalidOperand,
         format("The multicast mask 0x%x must name CTAs of the cluster, which has %zu.", mask,
                ctas));
  }
  for (uint32_t rank = 0; rank < ctas; ++rank) {
    if (!(mask >> rank & 1)) continue;
    const uint64_t base = uint64_t{rank} << kSharedRankShift;
    copy.destinations.push_back(base | (destination & kSharedOffsetMask));
    copy.mbarriers.push_back(base | (barrier & kSharedOffsetMask));
  }
}

}  // namespace gpu_emulator::exec
