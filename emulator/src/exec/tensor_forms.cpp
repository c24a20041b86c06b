// Tensor copies: cp.async.bulk.tensor, cp.reduce.async.bulk.tensor, their prefetches (PTX
// 9.7.9.25.5), prefetch.tensormap.

#include <cstring>

#include "bulk_copy.h"
#include "function_decoder.h"
#include "hopper_state.h"
#include "operand_addresses.h"
#include "report.h"

namespace gpu_emulator::exec {
namespace {

using Direction = BulkCopy::Direction;

// list: addresses of the box in shared memory, of the tensor map, of the mbarrier (two slots each),
// the CTA mask, then the coordinates. imm: dimensions. option: ReductionOp or kNoReduction, wide
// bases.
enum Place : int { kBox, kMap, kBarrier };
constexpr int kCtaMask = 6, kCoordinates = 7;
constexpr uint8_t kNoReduction = 0xff;

uint64_t address_of(const Warp& warp, const Instruction& in, Place place, int lane) {
  return listed_address(warp, in, place, in.option[1], lane);
}

TensorMap tensor_map(Warp& warp, int lane, uint64_t address) {
  AccessForm form;
  form.space = Space::kGeneric;
  form.proxy = Proxy::kTensorMap;
  form.bytes = sizeof(TensorMap);
  form.alignment = alignof(TensorMap);
  form.counted = false;
  TensorMap map;
  std::memcpy(&map, resolve_one(warp, form, lane, address), sizeof(map));
  const std::string error = tensor_map_error(map);
  if (!error.empty()) {
    fail(warp, lane, ReportKind::kInvalidOperand,
         format("The tensor map at 0x%llx is not valid: ",
                static_cast<unsigned long long>(address)) +
             error);
  }
  return map;
}

struct Box {
  TensorMap map;
  int32_t coordinates[kMaxTensorRank] = {};
};

Box box_of(Warp& warp, const Instruction& in, int lane) {
  Box box{tensor_map(warp, lane, address_of(warp, in, kMap, lane))};
  if (box.map.rank != in.imm) {
    fail(warp, lane, ReportKind::kInvalidOperand,
         format("The instruction is for %d dimensions, the tensor map for %d.",
                static_cast<int>(in.imm), box.map.rank));
  }
  for (int i = 0; i < box.map.rank; ++i) {
    box.coordinates[i] = warp.lanes<int32_t>(warp.list(in)[kCoordinates + i])[lane];
  }
  return box;
}

void require_aligned_box(const Warp& warp, int lane, uint64_t address) {
  constexpr uint64_t kAlignment = 128;
  if (address % kAlignment == 0) return;
  fail(warp, lane, ReportKind::kMisaligned,
       format("Misaligned: the box's shared address 0x%llx must be a multiple of 128.",
              static_cast<unsigned long long>(address)));
}

std::shared_ptr<BulkCopy> make_copy(Warp& warp, const Instruction& in, int lane,
                                    Direction direction) {
  const Box box = box_of(warp, in, lane);
  auto copy = std::make_shared<BulkCopy>();
  copy->site = issue_site(warp, lane);
  copy->direction = direction;
  copy->bytes = box_bytes(box.map);
  copy->segments = box_segments(box.map, box.coordinates);
  copy->swizzle = static_cast<uint32_t>(swizzle_bytes(box.map.swizzle));
  copy->fill = fill_pattern(box.map);
  copy->flush_subnormals =
      box.map.element == TensorElement::kF32Ftz || box.map.element == TensorElement::kTf32Ftz;
  require_aligned_box(warp, lane, address_of(warp, in, kBox, lane));
  count_bytes(warp, copy->bytes);
  return copy;
}

// The destination CTAs of a multicast: the same offsets in each.
void set_multicast(Warp& warp, const Instruction& in, int lane, BulkCopy& copy) {
  const uint32_t mask = warp.lanes<uint32_t>(warp.list(in)[kCtaMask])[lane] & 0xffff;
  const size_t ctas = warp.cta->cluster->ctas.size();
  if (mask == 0 || mask >> ctas != 0) {
    fail(warp, lane, ReportKind::kInvalidOperand,
         format("The multicast mask 0x%x must name CTAs of the cluster, which has %zu.", mask,
                ctas));
  }
  for (uint32_t rank = 0; rank < ctas; ++rank) {
    if (!(mask >> rank & 1)) continue;
    const uint64_t base = uint64_t{rank} << kSharedRankShift;
    copy.destinations.push_back(base | (address_of(warp, in, kBox, lane) & kSharedOffsetMask));
    copy.mbarriers.push_back(base | (address_of(warp, in, kBarrier, lane) & kSharedOffsetMask));
  }
}

Step run_load(Warp& warp, const Instruction& in, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    auto copy = make_copy(warp, in, lane, Direction::kGlobalToShared);
    if (warp.list(in)[kCtaMask] != kNoSlot) {
      set_multicast(warp, in, lane, *copy);
    } else {
      copy->destinations = {address_of(warp, in, kBox, lane)};
      copy->mbarriers = {address_of(warp, in, kBarrier, lane)};
      if (copy->destinations[0] >> kSharedRankShift != copy->mbarriers[0] >> kSharedRankShift) {
        fail(warp, lane, ReportKind::kInvalidOperand,
             "The mbarrier is not in the shared memory of the destination's CTA.");
      }
    }
    for (uint64_t address : copy->mbarriers) mbarrier_at(warp, lane, address);
    issue_to_mbarriers(std::move(copy), "cp.async.bulk.tensor");
  });
  return Step::kNext;
}

Reduction reduction_of(const Warp& warp, int lane, ReductionOp op, TensorElement element) {
  using ptx::Type;
  constexpr Type kTypes[] = {Type::kNone, Type::kNone, Type::kU32, Type::kS32, Type::kU64,
                             Type::kS64,  Type::kF16,  Type::kF32, Type::kF64, Type::kBf16,
                             Type::kF32,  Type::kNone, Type::kNone};
  const Type type = kTypes[static_cast<int>(element)];
  const bool bits = op == ReductionOp::kAnd || op == ReductionOp::kOr || op == ReductionOp::kXor;
  const bool half = type == Type::kF16 || type == Type::kBf16;
  const bool count = op == ReductionOp::kInc || op == ReductionOp::kDec;
  const bool order = op == ReductionOp::kMin || op == ReductionOp::kMax;
  const bool valid = type != Type::kNone && !(bits && is_float(element)) &&
                     !(count && type != Type::kU32) && !(order && is_float(element) && !half);
  if (!valid) {
    fail(warp, lane, ReportKind::kInvalidOperand,
         "The reduction is not defined for the tensor map's element type.");
  }
  return {op, type};
}

Step run_store(Warp& warp, const Instruction& in, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    auto copy = make_copy(warp, in, lane, Direction::kSharedToGlobal);
    copy->source = address_of(warp, in, kBox, lane);
    if (in.option[0] != kNoReduction) {
      const Box box = box_of(warp, in, lane);
      copy->reduction =
          reduction_of(warp, lane, static_cast<ReductionOp>(in.option[0]), box.map.element);
    }
    issue_to_group(std::move(copy));
  });
  return Step::kNext;
}

Step run_prefetch_box(Warp& warp, const Instruction& in, uint32_t mask) {
  for_each_lane(mask, [&](int lane) { box_of(warp, in, lane); });
  return Step::kNext;
}

Step run_prefetch_map(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  const uint64_t window = in.space == Space::kParam ? kParamWindow : 0;
  for_each_lane(mask, [&](int lane) { tensor_map(warp, lane, address[lane] | window); });
  return Step::kNext;
}

// ------------------------------------------------------------------------------------------
// decoding

int take_dimensions(Decoder& decoder) {
  const int index = decoder.take_any({"1d", "2d", "3d", "4d", "5d"});
  if (index < 0) throw Unsupported("dimensions");
  return index + 1;
}

// L2 hints change nothing. Load modes other than .tile are named by their modifiers.
void take_hints(Decoder& decoder) {
  decoder.take("tile");
  decoder.take("L2::cache_hint");
}

struct Operands {
  const ptx::Operand *box = nullptr, *map = nullptr, *barrier = nullptr, *cta_mask = nullptr;
};

void decode_operands(Decoder& decoder, const Operands& operands, int dimensions) {
  std::vector<Slot> slots;
  const ptx::Operand* places[] = {operands.box, operands.map, operands.barrier};
  for (int i = 0; i < 3; ++i) {
    if (places[i]) {
      append_address(decoder, *places[i], i, slots, &decoder.out.option[1]);
    } else {
      slots.insert(slots.end(), 2, kNoSlot);
    }
  }
  slots.push_back(operands.cta_mask ? decoder.source(*operands.cta_mask, ptx::Type::kU16)
                                    : kNoSlot);
  if (operands.map->elements.size() != 2) throw Unsupported("tensor coordinates");
  const std::vector<ptx::Operand> coordinates = decoder.elements(operands.map->elements[1]);
  if (static_cast<int>(coordinates.size()) != dimensions) throw Unsupported("tensor coordinates");
  for (const ptx::Operand& coordinate : coordinates) {
    slots.push_back(decoder.source(coordinate, ptx::Type::kS32));
  }
  decoder.list(slots);
  decoder.out.imm = dimensions;
  decoder.out.counter_class = InstructionClass::kAsyncCopy;
}

void decode_load(Decoder& decoder) {
  const int dimensions = take_dimensions(decoder);
  take_hints(decoder);
  if (!decoder.take("mbarrier::complete_tx::bytes")) throw Unsupported("completion mechanism");
  const bool multicast = decoder.take("multicast::cluster");
  if (decoder.take_any({"shared::cluster", "shared::cta"}) < 0 || !decoder.take("global")) {
    throw Unsupported("state spaces");
  }
  Operands operands;
  operands.box = &decoder.operand(0);
  operands.map = &decoder.operand(1);
  operands.barrier = &decoder.operand(2);
  if (multicast) operands.cta_mask = &decoder.operand(3);
  decode_operands(decoder, operands, dimensions);
  decoder.out.run = run_load;
}

void decode_store_to(Decoder& decoder, uint8_t reduction) {
  if (!decoder.take("bulk_group") || !decoder.take("global") ||
      decoder.take_any({"shared::cta", "shared"}) < 0) {
    throw Unsupported("state spaces");
  }
  const int dimensions = take_dimensions(decoder);
  take_hints(decoder);
  Operands operands;
  operands.map = &decoder.operand(0);
  operands.box = &decoder.operand(1);
  decode_operands(decoder, operands, dimensions);
  decoder.out.option[0] = reduction;
  decoder.out.run = run_store;
}

bool has(const Decoder& decoder, std::string_view modifier) {
  for (const std::string& word : decoder.ast.modifiers) {
    if (word == modifier) return true;
  }
  return false;
}

void decode_copy(Decoder& decoder) {
  if (has(decoder, "bulk_group")) {
    decode_store_to(decoder, kNoReduction);
  } else {
    decode_load(decoder);
  }
}

void decode_reduce(Decoder& decoder) {
  const int op = decoder.take_any({"add", "min", "max", "inc", "dec", "and", "or", "xor"});
  if (op < 0) throw Unsupported("reduction");
  decode_store_to(decoder, static_cast<uint8_t>(op));
}

void decode_prefetch_box(Decoder& decoder) {
  const int dimensions = take_dimensions(decoder);
  take_hints(decoder);
  if (!decoder.take("L2") || !decoder.take("global")) throw Unsupported("state spaces");
  Operands operands;
  operands.map = &decoder.operand(0);
  decode_operands(decoder, operands, dimensions);
  decoder.out.run = run_prefetch_box;
}

void decode_prefetch_map(Decoder& decoder) {
  const Decoder::Address address = decoder.address(decoder.operand(0));
  decoder.out.a = address.slot;
  decoder.out.imm = address.offset;
  decoder.out.wide_address = address.wide;
  decoder.out.counter_class = InstructionClass::kOther;
  decoder.out.run = run_prefetch_map;
}

void decode_prefetch_param_map(Decoder& decoder) {
  decode_prefetch_map(decoder);
  decoder.out.space = Space::kParam;
}

constexpr Form kForms[] = {
    {"cp.async.bulk.tensor", decode_copy},
    {"cp.reduce.async.bulk.tensor", decode_reduce},
    {"cp.async.bulk.prefetch.tensor", decode_prefetch_box},
    {"prefetch.tensormap", decode_prefetch_map},
    {"prefetch.const.tensormap", decode_prefetch_map},
    {"prefetch.param.tensormap", decode_prefetch_param_map},
};

}  // namespace

std::span<const Form> tensor_forms() { return kForms; }

}  // namespace gpu_emulator::exec
