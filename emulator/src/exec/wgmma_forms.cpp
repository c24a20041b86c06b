// wgmma.fence, mma_async, commit_group, wait_group (PTX 9.7.15).

#include <charconv>

#include "async.h"
#include "decode.h"
#include "function_decoder.h"
#include "hopper_state.h"
#include "report.h"
#include "scheduler.h"
#include "wgmma.h"

namespace gpu_emulator::exec {
namespace {

// --------------------------------------------------------------------------------------- execution

void require_whole_warp(const Warp& warp, uint32_t mask) {
  if (mask == kAllLanes) return;
  fail(warp, -1, ReportKind::kDivergence,
       format("wgmma executed by a part of its warp (lanes 0x%08x).", mask));
}

Warpgroup& warpgroup_of(Warp& warp) {
  const size_t index = warp.id / kWarpgroupWarps;
  if ((index + 1) * kWarpgroupWarps > warp.cta->warps.size()) {
    fail(warp, -1, ReportKind::kInvalidOperand,
         "wgmma executed by a warp that does not belong to a warpgroup of four warps.");
  }
  std::vector<Warpgroup>& groups = hopper(*warp.cta).warpgroups;
  if (groups.empty()) groups.resize(warp.cta->warps.size() / kWarpgroupWarps);
  return groups[index];
}

Warpgroup::WarpState& state_of(Warp& warp, Warpgroup& group) {
  return group.warps[warp.id % kWarpgroupWarps];
}

Step run_fence(Warp& warp, const Instruction&, uint32_t mask) {
  require_whole_warp(warp, mask);
  state_of(warp, warpgroup_of(warp)).fenced = true;
  return Step::kNext;
}

Step run_commit_group(Warp& warp, const Instruction&, uint32_t mask) {
  require_whole_warp(warp, mask);
  ++state_of(warp, warpgroup_of(warp)).groups;
  return Step::kNext;
}

uint64_t uniform_descriptor(const Warp& warp, Slot slot) {
  const uint64_t* lanes = warp.lanes<uint64_t>(slot);
  for (int lane = 1; lane < kWarpSize; ++lane) {
    if (lanes[lane] != lanes[0]) {
      fail(warp, lane, ReportKind::kInvalidOperand,
           "The matrix descriptor differs between the lanes of the warp.");
    }
  }
  return lanes[0];
}

bool scale_d(const Warp& warp, const Instruction& in) {
  const uint32_t lanes = warp.predicate(in.c);
  if (lanes != 0 && lanes != kAllLanes) {
    fail(warp, -1, ReportKind::kInvalidOperand, "scale-d differs between the lanes of the warp.");
  }
  return lanes != 0;
}

WgmmaAccumulators accumulators_of(const WgmmaOperation& operation, uint32_t index) {
  return {operation.instruction, operation.function, operation.parts[index].frame};
}

bool are_accumulators_of(const Warp& warp, const Instruction& in, const WgmmaAccumulators& other) {
  if (other.function != warp.function || other.frame != warp.bases[0]) return false;
  if (other.instruction->imm != in.imm) return false;
  const Slot* lists = warp.function->lists.data();
  const int count = shape_of(in).d_registers();
  return std::equal(lists + in.list, lists + in.list + count, lists + other.instruction->list);
}

// Registers may have changed since the last wait, except where nothing but wgmma of the same
// accumulators used them: the last one that was waited for, and those still in flight.
void require_fence(const Warp& warp, const Instruction& in, const Warpgroup& group) {
  const uint32_t index = warp.id % kWarpgroupWarps;
  const Warpgroup::WarpState& state = group.warps[index];
  if (state.fenced || !reports(warp, ReportKind::kWgmmaFence)) return;
  const bool in_flight = std::any_of(
      group.operations.begin(), group.operations.end(), [&](const WgmmaOperation& operation) {
        const bool own = (operation.issued & ~operation.retired) >> index & 1;
        return own && are_accumulators_of(warp, in, accumulators_of(operation, index));
      });
  const bool ordered = in_flight || are_accumulators_of(warp, in, state.retired);
  if (ordered && !shape_of(in).a_in_registers) return;
  fail(warp, -1, ReportKind::kWgmmaFence,
       "wgmma.mma_async without a wgmma.fence after the last accesses to its registers.");
}

// The operation that this warp issues now: the first of its warpgroup to do so makes it.
WgmmaOperation& operation_of(Warp& warp, const Instruction& in, Warpgroup& group) {
  const uint64_t number = state_of(warp, group).issued++;
  WgmmaOperation now;
  now.instruction = &in;
  now.function = warp.function;
  now.pc = warp.pc;
  const WgmmaShape shape = shape_of(in);
  if (!shape.a_in_registers) now.a = uniform_descriptor(warp, in.a);
  now.b = uniform_descriptor(warp, in.b);
  now.accumulate = scale_d(warp, in);
  if (number - group.first == group.operations.size()) {
    group.operations.push_back(std::move(now));
    return group.operations.back();
  }
  WgmmaOperation& first = group.operations[number - group.first];
  if (first.instruction != &in) {
    fail(warp, -1, ReportKind::kDivergence,
         format("The warps of a warpgroup execute different wgmma: another one is at PTX line %d.",
                first.function->lines[first.pc]));
  }
  if (first.a != now.a || first.b != now.b || first.accumulate != now.accumulate) {
    fail(warp, -1, ReportKind::kInvalidOperand,
         "Matrix descriptors or scale-d differ between the warps of the warpgroup.");
  }
  return first;
}

// Takes the instruction's registers, where operations are left for later.
void take_registers(Warp& warp, const Instruction& in, WgmmaPart& part) {
  const Slot* slots = warp.list(in);
  const int accumulators = shape_of(in).d_registers();
  RegistersInFlight& in_flight = hopper(warp).in_flight;
  part.in_flight.assign(in.count, nullptr);
  for (int i = 0; i < in.count; ++i) {
    if (slots[i] & kConstantBit) continue;
    part.in_flight[i] = in_flight.take(part.frame, slots[i], i < accumulators);
    if (!part.in_flight[i] && reports(warp, ReportKind::kWgmmaRegisters)) {
      fail(warp, -1, ReportKind::kWgmmaRegisters,
           "A register of this wgmma is in another role in a wgmma that is still in flight.");
    }
  }
}

const Isa& isa_of(const Warp& warp) { return *launch_of(warp).launch->program->isa; }

constexpr uint32_t kAllWarps = (1u << kWarpgroupWarps) - 1;

// Computes operations up to `end`, in order; all four warps have issued them.
void compute_until(Warpgroup& group, size_t end, const Isa& isa) {
  for (size_t i = 0; i < end; ++i) {
    if (!group.operations[i].computed) compute(group.operations[i], isa);
  }
}

Step run_mma_async(Warp& warp, const Instruction& in, uint32_t mask) {
  require_whole_warp(warp, mask);
  Warpgroup& group = warpgroup_of(warp);
  Warpgroup::WarpState& state = state_of(warp, group);
  require_fence(warp, in, group);
  const size_t index = state.issued - group.first;
  WgmmaOperation& operation = operation_of(warp, in, group);
  const bool eager = launch_of(warp).options->mode == Mode::kEager;
  WgmmaPart& part = operation.parts[warp.id % kWarpgroupWarps];
  part.warp = &warp;
  part.frame = warp.bases[0];
  part.group = state.groups;
  if (!eager) take_registers(warp, in, part);
  operation.issued |= 1u << warp.id % kWarpgroupWarps;
  if (operation.issued != kAllWarps) return Step::kNext;
  show_operands(operation, false);
  if (!defers(*warp.cta->cluster)) compute_until(group, index + 1, isa_of(warp));
  return Step::kNext;
}

void retire(Warp& warp, Warpgroup::WarpState& state, WgmmaOperation& operation) {
  const uint32_t index = warp.id % kWarpgroupWarps;
  if (!operation.shown) show_operands(operation, true);
  operation.shown = true;
  operation.retired |= 1u << index;
  state.fenced = false;
  state.retired = accumulators_of(operation, index);
  if (Observer* observer = observer_of(warp)) observer->wgmma_completes(warp, operation);
  for (RegistersInFlight::Value* value : operation.parts[index].in_flight) {
    const bool was_written = value && !hopper(warp).in_flight.release(value);
    if (was_written && reports(warp, ReportKind::kWgmmaRegisters)) {
      fail(warp, -1, ReportKind::kWgmmaRegisters,
           format("A register of the wgmma at PTX line %d was written before the wait for it.",
                  operation.function->lines[operation.pc]));
    }
  }
}

Step run_wait_group(Warp& warp, const Instruction& in, uint32_t mask) {
  require_whole_warp(warp, mask);
  Warpgroup& group = warpgroup_of(warp);
  Warpgroup::WarpState& state = state_of(warp, group);
  const int index = warp.id % kWarpgroupWarps;
  // Operations of the groups before this one must be complete.
  const int64_t end_group = int64_t{state.groups} - in.imm;
  size_t end = 0;
  while (end < group.operations.size() && group.first + end < state.issued &&
         group.operations[end].parts[index].group < end_group) {
    if (group.operations[end++].issued != kAllWarps) {
      warp.fragment().wait = {Wait::Kind::kWarpgroup, static_cast<uint32_t>(end_group), 0,
                              "wgmma.wait_group: not all warps of the warpgroup have issued it"};
      return Step::kRetry;
    }
  }
  compute_until(group, end, isa_of(warp));
  for (size_t i = 0; i < end; ++i) {
    WgmmaOperation& operation = group.operations[i];
    if (!(operation.retired >> index & 1)) retire(warp, state, operation);
  }
  while (!group.operations.empty() && group.operations.front().retired == kAllWarps) {
    group.operations.pop_front();
    ++group.first;
  }
  if (Observer* observer = observer_of(warp)) {
    SyncEvent event{SyncKind::kWarpgroupWait};
    event.mask = mask;
    event.id = warp.id - static_cast<uint32_t>(index);
    observer->synchronise(warp, event);
  }
  return Step::kNext;
}

// ---------------------------------------------------------------------------------------- decoding

MatrixType matrix_type(const std::string& word) {
  constexpr std::string_view kNames[] = {"f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8"};
  for (size_t i = 0; i < std::size(kNames); ++i) {
    if (word == kNames[i]) return static_cast<MatrixType>(i);
  }
  throw Unsupported("matrix type ." + word);
}

bool is_fp8(MatrixType type) { return type == MatrixType::kE4m3 || type == MatrixType::kE5m2; }
bool is_integer(MatrixType type) { return type == MatrixType::kS8 || type == MatrixType::kU8; }
bool is_16_bit(MatrixType type) { return type == MatrixType::kF16 || type == MatrixType::kBf16; }

AccumulatorType accumulator_type(const std::string& word, const WgmmaShape& shape, bool saturate) {
  const bool same = shape.a == shape.b || (is_fp8(shape.a) && is_fp8(shape.b));
  if (is_integer(shape.a) && is_integer(shape.b) && word == "s32") {
    return saturate ? AccumulatorType::kS32Saturated : AccumulatorType::kS32;
  }
  if (!same || is_integer(shape.a) || saturate) throw Unsupported("these types together");
  if (word == "f32") return AccumulatorType::kF32;
  if (word == "f16" && (shape.a == MatrixType::kF16 || is_fp8(shape.a))) {
    return AccumulatorType::kF16;
  }
  throw Unsupported("accumulator type ." + word);
}

// "m64n128k16"
void parse_extents(const std::string& word, WgmmaShape& shape) {
  const char* end = word.data() + word.size();
  const size_t k = word.find('k');
  if (!word.starts_with("m64n") || k == std::string::npos ||
      std::from_chars(word.data() + 4, end, shape.n).ptr != word.data() + k ||
      std::from_chars(word.data() + k + 1, end, shape.k).ptr != end) {
    throw Unsupported("shape ." + word);
  }
  const int depth = shape.a == MatrixType::kTf32 ? 8 : is_16_bit(shape.a) ? 16 : 32;
  const int step = is_integer(shape.a) && shape.n > 32 ? 16 : 8;
  if (shape.n < 8 || shape.n > 256 || shape.n % step || shape.k != depth) {
    throw Unsupported("shape ." + word);
  }
}

// .shape{.satfinite}.dtype.atype.btype
WgmmaShape parse_shape(Decoder& decoder) {
  const std::vector<std::string>& words = decoder.ast.modifiers;
  constexpr size_t kBefore = 3;  // mma_async.sync.aligned
  const bool saturate = words.size() > kBefore + 1 && words[kBefore + 1] == "satfinite";
  const size_t d = kBefore + (saturate ? 2 : 1);
  if (words.size() != d + 3) throw Unsupported("modifiers");
  WgmmaShape shape;
  shape.a = matrix_type(words[d + 1]);
  shape.b = matrix_type(words[d + 2]);
  shape.d = accumulator_type(words[d], shape, saturate);
  parse_extents(words[kBefore], shape);
  decoder.skip(static_cast<int>(words.size()));
  return shape;
}

bool one_of(int64_t value, int64_t no, int64_t yes) {
  if (value != no && value != yes) throw Unsupported("immediate out of range");
  return value == yes;
}

// Operands after scale-d: imm-scale-a, imm-scale-b of floats; imm-trans-a (of A in shared memory),
// imm-trans-b of 16-bit types.
void parse_immediates(Decoder& decoder, WgmmaShape& shape) {
  size_t next = 4;
  auto immediate = [&] { return decoder.immediate(next++); };
  if (!is_integer(shape.a)) {
    shape.negate_a = one_of(immediate(), 1, -1);
    shape.negate_b = one_of(immediate(), 1, -1);
  }
  if (is_16_bit(shape.a)) {
    if (!shape.a_in_registers) shape.a_mn_major = one_of(immediate(), 0, 1);
    shape.b_mn_major = one_of(immediate(), 0, 1);
  }
  if (decoder.operands() != next) throw Unsupported("number of operands");
}

void decode_mma_async(Decoder& decoder) {
  WgmmaShape shape = parse_shape(decoder);
  std::vector<Slot> slots;
  for (const ptx::Operand& reg : decoder.elements(decoder.operand(0))) {
    slots.push_back(decoder.destination(reg, 4));
    decoder.function.reads(slots.back());
  }
  if (static_cast<int>(slots.size()) != shape.d_registers()) throw Unsupported("accumulators");
  shape.a_in_registers = decoder.operand(1).kind == ptx::Operand::Kind::kVector;
  if (shape.a_in_registers) {
    for (const ptx::Operand& reg : decoder.elements(decoder.operand(1))) {
      slots.push_back(decoder.source(reg, ptx::Type::kB32));
    }
    if (static_cast<int>(slots.size()) != shape.d_registers() + kARegisters) {
      throw Unsupported("registers of A");
    }
  } else {
    decoder.out.a = decoder.source(1, ptx::Type::kB64);
  }
  decoder.out.b = decoder.source(2, ptx::Type::kB64);
  bool negated = false;
  decoder.out.c = decoder.source_predicate(decoder.operand(3), &negated);
  if (negated) throw Unsupported("negated scale-d");
  parse_immediates(decoder, shape);
  set_shape(decoder.out, shape);
  decoder.list(slots);
  decoder.out.counter_class = InstructionClass::kTensor;
  decoder.out.run = run_mma_async;
}

void decode_simple(Decoder& decoder, Handler handler) {
  decoder.out.run = handler;
  decoder.out.counter_class = InstructionClass::kBarrier;
}

void decode_fence(Decoder& decoder) { decode_simple(decoder, run_fence); }
void decode_commit_group(Decoder& decoder) { decode_simple(decoder, run_commit_group); }
void decode_wait_group(Decoder& decoder) {
  decode_simple(decoder, run_wait_group);
  decoder.out.imm = decoder.immediate(0);
}

constexpr Form kForms[] = {
    {"wgmma.fence.sync.aligned", decode_fence},
    {"wgmma.mma_async.sync.aligned", decode_mma_async},
    {"wgmma.commit_group.sync.aligned", decode_commit_group},
    {"wgmma.wait_group.sync.aligned", decode_wait_group},
};

}  // namespace

std::span<const Form> wgmma_forms() { return kForms; }

}  // namespace gpu_emulator::exec
