// Tensor copies: cp.async.bulk.tensor, cp.reduce.async.bulk.tensor, their prefetches (PTX
// 9.7.9.25.5), prefetch.tensormap.

#include <cstring>

#include "bulk_operands.h"
#include "function_decoder.h"
#include "report.h"

namespace gpu_emulator::exec {
namespace {

// list: as in bulk_operands.h, then the coordinates. imm: dimensions.
enum Place : int { kBox, kMap };
constexpr int kCoordinates = kCtaMask + 1;

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
  Box box{tensor_map(warp, lane, listed_address(warp, in, kMap, lane))};
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
                                    BulkDirection direction) {
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
  require_aligned_box(warp, lane, listed_address(warp, in, kBox, lane));
  count_bytes(warp, copy->bytes);
  return copy;
}

Step run_load(Warp& warp, const Instruction& in, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    auto copy = make_copy(warp, in, lane, BulkDirection::kGlobalToShared);
    set_destinations(in, listed_address(warp, in, kBox, lane), *copy);
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
    auto copy = make_copy(warp, in, lane, BulkDirection::kSharedToGlobal);
    copy->source = listed_address(warp, in, kBox, lane);
    if (const auto op = options<BulkOptions>(in).reduction) {
      const Box box = box_of(warp, in, lane);
      copy->reduction = reduction_of(warp, lane, *op, box.map.element);
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

// ---------------------------------------------------------------------------------------- decoding

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
  append_places(decoder, {operands.box, operands.map, operands.barrier}, operands.cta_mask, slots);
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

void decode_store_to(Decoder& decoder, std::optional<ReductionOp> reduction) {
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
  make_options<BulkOptions>(decoder.out).reduction = reduction;
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
    decode_store_to(decoder, std::nullopt);
  } else {
    decode_load(decoder);
  }
}

void decode_reduce(Decoder& decoder) { decode_store_to(decoder, take_reduction(decoder)); }

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
  decoder.set_address(decoder.operand(0));
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
