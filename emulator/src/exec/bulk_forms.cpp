// Bulk copies of contiguous bytes and their groups (PTX 9.7.9.25.4, 9.7.9.25.3.1): cp.async.bulk,
// cp.reduce.async.bulk, st.async, red.async.

#include <cstring>

#include "bulk_operands.h"
#include "function_decoder.h"
#include "hopper_state.h"
#include "report.h"

namespace gpu_emulator::exec {
namespace {

// list: as in bulk_operands.h, then the size. type: of a reduction.
enum Place : int { kDestination, kSource };
constexpr int kSize = kCtaMask + 1;

uint32_t size_of_copy(const Warp& warp, const Instruction& in, int lane) {
  return warp.lanes<uint32_t>(warp.list(in)[kSize])[lane];
}

void require_multiple(const Warp& warp, int lane, const char* what, uint64_t value) {
  constexpr uint64_t kMultiple = 16;
  if (value % kMultiple == 0) return;
  fail(warp, lane, ReportKind::kMisaligned,
       format("Misaligned: the %s of a bulk copy, 0x%llx, must be a multiple of 16.", what,
              static_cast<unsigned long long>(value)));
}

std::optional<Reduction> reduction_of(const Instruction& in) {
  const std::optional<ReductionOp> op = options<BulkOptions>(in).reduction;
  if (!op) return std::nullopt;
  return Reduction{*op, in.type};
}

Step run_copy(Warp& warp, const Instruction& in, uint32_t mask) {
  const BulkDirection direction = options<BulkOptions>(in).direction;
  for_each_lane(mask, [&](int lane) {
    auto copy = std::make_shared<BulkCopy>();
    copy->site = issue_site(warp, lane);
    copy->direction = direction;
    copy->bytes = size_of_copy(warp, in, lane);
    const uint64_t source = listed_address(warp, in, kSource, lane);
    const uint64_t destination = listed_address(warp, in, kDestination, lane);
    require_multiple(warp, lane, "size", copy->bytes);
    require_multiple(warp, lane, "source address", source);
    require_multiple(warp, lane, "destination address", destination);
    if (copy->bytes == 0) return;
    copy->reduction = reduction_of(in);
    count_bytes(warp, copy->bytes);
    if (direction == BulkDirection::kSharedToGlobal) {
      copy->source = source;
      copy->segments = {{destination, 0, copy->bytes}};
      issue_to_group(std::move(copy));
      return;
    }
    if (direction == BulkDirection::kGlobalToShared) {
      copy->segments = {{source, 0, copy->bytes}};
    } else {
      copy->source = source;
    }
    set_destinations(in, destination, *copy);
    issue_to_mbarriers(std::move(copy), "cp.async.bulk");
  });
  return Step::kNext;
}

Step run_prefetch(Warp& warp, const Instruction& in, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    require_multiple(warp, lane, "address", listed_address(warp, in, kSource, lane));
    require_multiple(warp, lane, "size", size_of_copy(warp, in, lane));
  });
  return Step::kNext;
}

// ------------------------------------------------------------------------------------------ groups

Step run_commit_group(Warp& warp, const Instruction&, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { ++hopper(warp).bulk_groups[lane]; });
  return Step::kNext;
}

// imm: newest groups that may be incomplete.
Step run_wait_group(Warp& warp, const Instruction& in, uint32_t mask) {
  HopperWarpState& state = hopper(warp);
  const bool reads_only = options<BulkWaitOptions>(in).reads_only;
  std::erase_if(state.bulk, [&](BulkGroupCopy& entry) {
    const int lane = entry.copy->site.lane;
    const bool awaited =
        (mask >> lane & 1) && int64_t{entry.group} < int64_t{state.bulk_groups[lane]} - in.imm;
    if (!awaited) return false;
    at_site(entry.copy->site, [&] {
      complete_reads(*entry.copy);
      if (!reads_only) complete_writes(*entry.copy);
    });
    return !reads_only;
  });
  if (Observer* observer = observer_of(warp)) {
    SyncEvent event{SyncKind::kBulkWait};
    event.mask = mask;
    event.id = reads_only;
    observer->synchronise(warp, event);
  }
  return Step::kNext;
}

// -------------------------------------------------------------------------- st.async and red.async

// list: addresses of the destination and the mbarrier, then the values; bytes: of one.
Step run_store_async(Warp& warp, const Instruction& in, uint32_t mask) {
  constexpr int kAddressSlots = 4;
  const int values = in.count - kAddressSlots;
  const Observer* observer = observer_of(warp);
  for_each_lane(mask, [&](int lane) {
    auto copy = std::make_shared<BulkCopy>();
    copy->site = issue_site(warp, lane);
    copy->proxy = Proxy::kGeneric;
    copy->direction = BulkDirection::kRegistersToShared;
    copy->was_read = true;
    copy->bytes = static_cast<uint32_t>(values) * in.bytes;
    copy->box.resize(copy->bytes);
    for (int i = 0; i < values; ++i) {
      const Slot slot = warp.list(in)[kAddressSlots + i];
      const void* value = in.bytes == 8
                              ? static_cast<const void*>(warp.lanes<uint64_t>(slot) + lane)
                              : static_cast<const void*>(warp.lanes<uint32_t>(slot) + lane);
      std::memcpy(copy->box.data() + i * in.bytes, value, in.bytes);
      if (observer && observer->is_undefined(warp, slot, lane)) {
        copy->undefined.resize(copy->bytes);
        std::memset(copy->undefined.data() + i * in.bytes, 1, in.bytes);
      }
    }
    copy->reduction = reduction_of(in);
    const uint64_t destination = listed_address(warp, in, 0, lane);
    const uint64_t barrier = listed_address(warp, in, 1, lane);
    if (destination % copy->bytes) {
      fail(warp, lane, ReportKind::kMisaligned,
           format("Misaligned: the shared address 0x%llx must be a multiple of %u.",
                  static_cast<unsigned long long>(destination), copy->bytes));
    }
    copy->destinations = {destination};
    copy->mbarriers = {barrier};
    issue_to_mbarriers(std::move(copy), "st.async");
  });
  return Step::kNext;
}

// ---------------------------------------------------------------------------------------- decoding

void decode_operands(Decoder& decoder, const ptx::Operand* const (&places)[3],
                     const ptx::Operand& size, const ptx::Operand* cta_mask) {
  std::vector<Slot> slots;
  append_places(decoder, places, cta_mask, slots);
  slots.push_back(decoder.source(size, ptx::Type::kU32));
  decoder.list(slots);
  decoder.out.counter_class = InstructionClass::kAsyncCopy;
}

// The state spaces: the first two modifiers after `before` others.
BulkDirection take_direction(Decoder& decoder, size_t before) {
  const std::vector<std::string>& words = decoder.ast.modifiers;
  if (words.size() < before + 2) throw Unsupported("state spaces");
  const std::string& to = words[before];
  const std::string& from = words[before + 1];
  decoder.take(to);
  decoder.take(from);
  const bool to_shared = to == "shared::cluster" || to == "shared::cta";
  if (to_shared && from == "global") return BulkDirection::kGlobalToShared;
  if (to == "shared::cluster" && from == "shared::cta") return BulkDirection::kSharedToShared;
  if (to == "global" && from == "shared::cta") return BulkDirection::kSharedToGlobal;
  throw Unsupported("state spaces");
}

void decode_copy_of(Decoder& decoder, size_t before, std::optional<ReductionOp> reduction) {
  const BulkDirection direction = take_direction(decoder, before);
  const bool to_group = direction == BulkDirection::kSharedToGlobal;
  if (!decoder.take(to_group ? "bulk_group" : "mbarrier::complete_tx::bytes")) {
    throw Unsupported("completion mechanism");
  }
  const bool multicast =
      direction == BulkDirection::kGlobalToShared && decoder.take("multicast::cluster");
  decoder.take("L2::cache_hint");
  decode_operands(
      decoder, {&decoder.operand(0), &decoder.operand(1), to_group ? nullptr : &decoder.operand(3)},
      decoder.operand(2), multicast ? &decoder.operand(4) : nullptr);
  BulkOptions& bulk = make_options<BulkOptions>(decoder.out);
  bulk.direction = direction;
  bulk.reduction = reduction;
  decoder.out.run = run_copy;
}

void decode_copy(Decoder& decoder) {
  constexpr size_t kBefore = 2;  // async.bulk
  decode_copy_of(decoder, kBefore, std::nullopt);
}

bool is_defined(ReductionOp op, ptx::Type type, bool in_shared) {
  using ptx::Type;
  const bool word = type == Type::kU32 || type == Type::kS32;
  switch (op) {
    case ReductionOp::kAdd:
      return word || type == Type::kU64 || (!in_shared && is_float(type));
    case ReductionOp::kMin:
    case ReductionOp::kMax:
      return word || (!in_shared && (type == Type::kU64 || type == Type::kS64 ||
                                     type == Type::kF16 || type == Type::kBf16));
    case ReductionOp::kInc:
    case ReductionOp::kDec:
      return type == Type::kU32;
    default:
      return type == Type::kB32 || (!in_shared && type == Type::kB64);
  }
}

void decode_reduce(Decoder& decoder) {
  constexpr size_t kBefore = 3;  // reduce.async.bulk
  const ReductionOp op = take_reduction(decoder);
  decoder.take("noftz");
  decoder.out.type = decoder.take_type();
  decode_copy_of(decoder, kBefore, op);
  const bool in_shared =
      options<BulkOptions>(decoder.out).direction == BulkDirection::kSharedToShared;
  if (!is_defined(op, decoder.out.type, in_shared)) {
    throw Unsupported("type of the reduction");
  }
}

void decode_prefetch(Decoder& decoder) {
  decoder.take("L2::cache_hint");
  decode_operands(decoder, {nullptr, &decoder.operand(0), nullptr}, decoder.operand(1), nullptr);
  decoder.out.run = run_prefetch;
}

void decode_commit_group(Decoder& decoder) {
  decoder.out.counter_class = InstructionClass::kAsyncCopy;
  decoder.out.run = run_commit_group;
}

void decode_wait_group(Decoder& decoder) {
  make_options<BulkWaitOptions>(decoder.out).reads_only = decoder.take("read");
  decoder.out.imm = decoder.immediate(0);
  decoder.out.counter_class = InstructionClass::kBarrier;
  decoder.out.run = run_wait_group;
}

void decode_register_values(Decoder& decoder, std::optional<ReductionOp> reduction) {
  decoder.take_any({"weak", "relaxed"});
  decoder.take("cluster");
  decoder.take_any({"shared::cluster", "shared"});
  if (!decoder.take("mbarrier::complete_tx::bytes")) throw Unsupported("completion mechanism");
  decoder.take_any({"v2", "v4"});
  decoder.out.type = decoder.take_type();
  decoder.out.bytes = static_cast<uint8_t>(size_of(decoder.out.type));
  if (decoder.out.bytes != 4 && decoder.out.bytes != 8) throw Unsupported("type");
  std::vector<Slot> slots;
  append_address(decoder, decoder.operand(0), 0, slots);
  append_address(decoder, decoder.operand(2), 1, slots);
  for (const ptx::Operand& value : decoder.elements(decoder.operand(1))) {
    slots.push_back(decoder.source(value, decoder.out.type));
  }
  decoder.list(slots);
  make_options<BulkOptions>(decoder.out).reduction = reduction;
  decoder.out.counter_class = InstructionClass::kAsyncCopy;
  decoder.out.run = run_store_async;
}

void decode_store_async(Decoder& decoder) { decode_register_values(decoder, std::nullopt); }

void decode_reduce_async(Decoder& decoder) {
  const ReductionOp op = take_reduction(decoder);
  decode_register_values(decoder, op);
  if (!is_defined(op, decoder.out.type, true)) {
    throw Unsupported("type of the reduction");
  }
}

constexpr Form kForms[] = {
    {"cp.async.bulk", decode_copy},
    {"cp.reduce.async.bulk", decode_reduce},
    {"cp.async.bulk.prefetch.L2.global", decode_prefetch},
    {"cp.async.bulk.commit_group", decode_commit_group},
    {"cp.async.bulk.wait_group", decode_wait_group},
    {"st.async", decode_store_async},
    {"red.async", decode_reduce_async},
};

}  // namespace

std::span<const Form> bulk_forms() { return kForms; }

}  // namespace gpu_emulator::exec
