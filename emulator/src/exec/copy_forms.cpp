// cp.async of up to 16 bytes a thread, to shared memory (PTX 9.7.9.25.3). TMA and bulk copies are
// elsewhere.
//
// Late mode: a copy lands when its issuing thread waits for its group, at the latest; until then
// the destination holds poison. Random mode: at once or late, as the seed says.

#include <cstring>

#include "async.h"
#include "decode.h"
#include "function_decoder.h"
#include "memory.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Type;

// Host addresses of source and destination of the lanes of mask: checked, and shown to the observer
// as begun or as done. Lanes with nothing to read have no source.
struct CopyPlaces {
  std::byte* from[kWarpSize];
  std::byte* to[kWarpSize];
  uint32_t whole;  // lanes that read as much as they write
};

void resolve_copy(Warp& warp, const PendingCopy& copy, uint32_t mask, Moment moment,
                  CopyPlaces& places) {
  const uint32_t bytes = copy.instruction->bytes;
  uint64_t address[kWarpSize];
  uint32_t whole = 0, partial = 0;
  for_each_lane(mask, [&](int lane) {
    address[lane] = copy.destination[lane];
    if (copy.source_bytes[lane] == bytes)
      whole |= 1u << lane;
    else if (copy.source_bytes[lane])
      partial |= 1u << lane;
  });
  places.whole = whole;
  AccessForm source;
  source.space = Space::kGlobal;
  source.proxy = Proxy::kCopy;
  source.alignment = source.bytes = bytes;
  source.announce_only = moment == Moment::kIssue;
  source.counted = moment == Moment::kIssue;
  if (whole) resolve(warp, source, whole, copy.source.data(), places.from);
  for_each_lane(partial, [&](int lane) {
    source.bytes = copy.source_bytes[lane];
    places.from[lane] = resolve_one(warp, source, lane, copy.source[lane]);
  });
  AccessForm destination;
  destination.space = Space::kShared;
  destination.kind = AccessKind::kStore;
  destination.proxy = Proxy::kCopy;
  destination.bytes = destination.alignment = bytes;
  destination.announce_only = moment == Moment::kIssue;
  destination.counted = moment == Moment::kIssue;
  resolve(warp, destination, mask, address, places.to);
}

template <uint32_t kBytes>
void move_whole(uint32_t mask, const CopyPlaces& places) {
  for_each_lane(mask, [&](int lane) { std::memcpy(places.to[lane], places.from[lane], kBytes); });
}

// Lanes read as many bytes as they asked for (0 to `bytes`); the rest is zero.
void move_bytes(const PendingCopy& copy, uint32_t mask, const CopyPlaces& places) {
  const uint32_t bytes = copy.instruction->bytes;
  if (places.whole == mask) {
    const auto move = bytes == 16 ? move_whole<16> : bytes == 8 ? move_whole<8> : move_whole<4>;
    move(mask, places);
    return;
  }
  for_each_lane(mask, [&](int lane) {
    const uint32_t given = copy.source_bytes[lane];
    if (given) std::memcpy(places.to[lane], places.from[lane], given);
    std::memset(places.to[lane] + given, 0, bytes - given);
  });
}

void land(Warp& warp, const PendingCopy& copy, uint32_t mask) {
  at_site({&warp, copy.function, copy.pc, first_lane(mask)}, [&] {
    CopyPlaces places;
    resolve_copy(warp, copy, mask, Moment::kCompletion, places);
    if (!copy.is_moved) move_bytes(copy, mask, places);
  });
}

uint32_t source_bytes(const Warp& warp, const Instruction& in, const CopyOptions& how, int lane) {
  if (how.ignores_source) return warp.predicate(in.b) >> lane & 1 ? 0 : in.bytes;
  if (in.b == kNoSlot) return in.bytes;
  const uint32_t given = warp.lanes<uint32_t>(in.b)[lane];
  if (given > in.bytes) {
    fail(warp, lane, ReportKind::kInvalidOperand,
         format("cp.async of %u bytes with a source of %u.", in.bytes, given));
  }
  return given;
}

Step run_copy(Warp& warp, const Instruction& in, uint32_t mask) {
  PendingCopy copy;
  copy.instruction = &in;
  copy.pc = warp.pc;
  copy.function = warp.function;
  copy.mask = mask;
  copy.group = warp.copy_groups;
  uint64_t destination[kWarpSize];
  addresses(warp, in.d, options<CopyOptions>(in).wide_destination, in.option_offset, destination);
  addresses(warp, in.a, in.wide_address, in.imm, copy.source.data());
  const CopyOptions how = options<CopyOptions>(in);
  for_each_lane(mask, [&](int lane) {
    copy.destination[lane] = static_cast<uint32_t>(destination[lane]);
    copy.source_bytes[lane] = static_cast<uint8_t>(source_bytes(warp, in, how, lane));
  });
  copy.is_moved = !defers(*warp.cta->cluster);
  CopyPlaces places;
  resolve_copy(warp, copy, mask, Moment::kIssue, places);
  if (copy.is_moved) {
    move_bytes(copy, mask, places);
  } else {
    for_each_lane(mask, [&](int lane) { std::memset(places.to[lane], kPoison, in.bytes); });
  }
  // The observer is told when the copy is waited for, wherever the bytes were moved.
  if (!copy.is_moved || observer_of(warp)) warp.copies.push_back(copy);
  return Step::kNext;
}

// cp.async.ca/cg.shared.global [dst], [src], bytes{, src-size | ignore-src}{, policy}
void decode_copy(Decoder& decoder) {
  Instruction& out = decoder.out;
  if (decoder.take_any({"ca", "cg"}) < 0) throw Unsupported("cache operator");
  if (decoder.take_any({"shared", "shared::cta"}) < 0) throw Unsupported("destination space");
  if (!decoder.take("global")) throw Unsupported("source space");
  const bool has_policy = decoder.take("L2::cache_hint");
  decoder.take_starting("L2::");
  const Decoder::Address to = decoder.address(decoder.operand(0));
  out.d = to.slot;
  CopyOptions& how = make_options<CopyOptions>(out);
  how.wide_destination = to.wide;
  out.option_offset = to.offset;
  decoder.set_address(decoder.operand(1));
  const int64_t bytes = decoder.immediate(2);
  if (bytes != 4 && bytes != 8 && bytes != 16) throw Unsupported("copy of this size");
  out.bytes = static_cast<uint8_t>(bytes);
  const size_t own = decoder.operands() - (has_policy ? 1 : 0);
  if (own > 3) {
    const bool is_predicate = decoder.register_bytes(decoder.operand(3)) == 0;
    how.ignores_source = is_predicate;
    out.b = decoder.source(3, is_predicate ? Type::kPred : Type::kU32);
  }
  out.run = run_copy;
  out.counter_class = InstructionClass::kAsyncCopy;
}

Step run_commit(Warp& warp, const Instruction&, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { ++warp.copy_groups[lane]; });
  return Step::kNext;
}

void decode_commit(Decoder& decoder) {
  decoder.out.run = run_commit;
  decoder.out.counter_class = InstructionClass::kAsyncCopy;
}

Step run_wait(Warp& warp, const Instruction& in, uint32_t mask) {
  const bool ungrouped = options<CopyWaitOptions>(in).ungrouped;
  complete_copies(warp, mask, static_cast<uint32_t>(in.imm), ungrouped);
  if (Observer* observer = observer_of(warp)) {
    observer->synchronise(warp, {SyncKind::kCopyWait, mask, static_cast<uint32_t>(in.imm),
                                 Order::kWeak, Scope::kNone});
  }
  return Step::kNext;
}

void decode_wait_group(Decoder& decoder) {
  make_options<CopyWaitOptions>(decoder.out);
  decoder.out.imm = decoder.immediate(0);
  if (decoder.out.imm < 0) throw Unsupported("negative number of groups");
  decoder.out.run = run_wait;
  decoder.out.counter_class = InstructionClass::kAsyncCopy;
}

void decode_wait_all(Decoder& decoder) {
  make_options<CopyWaitOptions>(decoder.out).ungrouped = true;
  decoder.out.run = run_wait;
  decoder.out.counter_class = InstructionClass::kAsyncCopy;
}

constexpr Form kForms[] = {
    {"cp.async", decode_copy},
    {"cp.async.commit_group", decode_commit},
    {"cp.async.wait_group", decode_wait_group},
    {"cp.async.wait_all", decode_wait_all},
};

}  // namespace

void complete_copies(Warp& warp, uint32_t mask, uint32_t keep, bool ungrouped) {
  for (PendingCopy& copy : warp.copies) {
    uint32_t due = 0;
    for_each_lane(copy.mask & mask, [&](int lane) {
      const bool committed = copy.group[lane] + uint64_t{keep} < warp.copy_groups[lane];
      if (committed || ungrouped) due |= 1u << lane;
    });
    if (!due) continue;
    land(warp, copy, due);
    copy.mask &= ~due;
  }
  std::erase_if(warp.copies, [](const PendingCopy& copy) { return copy.mask == 0; });
}

std::span<const Form> copy_forms() { return kForms; }

}  // namespace gpu_emulator::exec
