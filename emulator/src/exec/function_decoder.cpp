#include "function_decoder.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>

#include "../ptx/cfg.h"
#include "flow.h"
#include "memory.h"
#include "report.h"

namespace gpu_emulator::exec {
namespace {

constexpr uint32_t kSlotAlignment = 64;

uint32_t aligned(uint64_t value, uint64_t alignment) {
  return static_cast<uint32_t>((value + alignment - 1) / alignment * alignment);
}

const std::unordered_map<std::string_view, DecodeForm>& forms() {
  static const auto* const table = [] {
    auto* all = new std::unordered_map<std::string_view, DecodeForm>;
    for (const auto& family :
         {arithmetic_forms(), integer_forms(), float_forms(), compare_forms(), convert_forms(),
          move_forms(), memory_forms(), atomic_forms(), warp_forms(), control_forms(),
          barrier_forms(), mma_forms(), copy_forms(), mbarrier_forms(), bulk_forms(),
          tensor_forms(), wgmma_forms(), cluster_forms(), stmatrix_forms()}) {
      for (const Form& form : family) all->emplace(form.opcode, form.decode);
    }
    return all;
  }();
  return *table;
}

Step run_unsupported(Warp& warp, const Instruction& in, uint32_t mask) {
  fail(warp, first_lane(mask), ReportKind::kUnsupported,
       "The emulator does not know this instruction: " + warp.function->unsupported[in.imm] + ".");
}

}  // namespace

FunctionDecoder::FunctionDecoder(const ptx::Module& module, int index, const Program& program,
                                 Function& out)
    : module_(module), ast_(module.functions[index]), program_(program), out_(out), index_(index) {
  layout_local();
}

// Entry parameters get offsets in the launch's parameter block; all other .param variables and
// .local ones lie in the frame's local memory.
void FunctionDecoder::layout_local() {
  auto place = [](const ptx::Variable& variable, uint32_t& end) {
    const uint32_t offset = aligned(end, std::max<uint32_t>(variable.alignment, 1));
    end = offset + static_cast<uint32_t>(variable.bytes);
    return ParamLayout{offset, static_cast<uint32_t>(variable.bytes)};
  };
  uint32_t& param_end = ast_.is_entry ? out_.param_bytes : out_.local_bytes;
  for (const ptx::Variable& param : ast_.params) out_.params.push_back(place(param, param_end));
  for (const ptx::Variable& value : ast_.returns) {
    out_.returns.push_back(place(value, out_.local_bytes));
  }
  for (const ptx::Variable& variable : ast_.variables) {
    const bool shared = variable.space == ptx::Space::kShared;
    local_offsets_.push_back(shared ? 0 : place(variable, out_.local_bytes).offset);
  }
  out_.local_bytes = aligned(out_.local_bytes, 16);
}

// Twice: the first time tells which registers each instruction reads and writes.
void FunctionDecoder::run(const Isa& isa) {
  const RegisterAssignment separate = separate_registers(ast_);
  use(separate);
  decode_all(isa);
  use(share_registers(ast_, out_, separate));
  decode_all(isa);
  resolve_control_flow();
  out_.register_bytes = aligned(out_.register_bytes, kSlotAlignment);
}

void FunctionDecoder::use(const RegisterAssignment& registers) {
  register_slots_ = registers.slots;
  slot_units_.clear();
  for (size_t i = 0; i < ast_.registers.size(); ++i) {
    slot_units_[register_slots_[i]] = register_slot_bytes(ast_.registers[i].type) / kSlotAlignment;
  }
  out_.register_bytes = aligned(registers.bytes, kSlotAlignment);
  out_.max_live_registers = registers.max_live;
}

void FunctionDecoder::decode_all(const Isa& isa) {
  constants_.clear();
  frame_slots_.clear();
  out_.constants.clear();
  out_.frame_values.clear();
  out_.lists.clear();
  out_.effect_slots.clear();
  out_.branch_tables.clear();
  out_.unsupported.clear();
  out_.lines.clear();
  out_.sources.clear();
  out_.code.assign(ast_.body.size(), Instruction());
  out_.effects.assign(ast_.body.size(), Effects());
  for (size_t pc = 0; pc < ast_.body.size(); ++pc) {
    out_.lines.push_back(ast_.body[pc].line);
    out_.sources.push_back(ast_.body[pc].source);
    decode_one(pc, isa);
  }
}

void FunctionDecoder::decode_one(size_t pc, const Isa& isa) {
  const ptx::Instruction& ast = ast_.body[pc];
  reads_.clear();
  writes_.clear();
  try {
    Instruction instruction;
    Decoder decoder(*this, ast, instruction, isa);
    decode_form(decoder);
    decoder.expect_no_modifiers_left();
    out_.code[pc] = instruction;
  } catch (const Unsupported& reason) {
    std::string name = ast.opcode;
    for (const std::string& modifier : ast.modifiers) name += "." + modifier;
    out_.code[pc] = Instruction();
    out_.code[pc].run = run_unsupported;
    out_.code[pc].is_unsupported = true;
    out_.code[pc].imm = static_cast<int64_t>(out_.unsupported.size());
    out_.unsupported.push_back(name + " (" + reason.what() + ")");
    reads_.clear();
    writes_.clear();
  }
  if (ast.guard >= 0) {
    out_.code[pc].guard = register_slot(ast.guard);
    out_.code[pc].guard_negated = ast.guard_negated;
    reads(out_.code[pc].guard);
  }
  Effects& effects = out_.effects[pc];
  set_flow(ast, effects);
  auto append = [&](const std::vector<Slot>& slots, uint32_t& first, uint16_t& count) {
    first = static_cast<uint32_t>(out_.effect_slots.size());
    for (Slot slot : slots) {
      if (slot == kNoSlot || slot & kConstantBit) {
        if (effects.flow != Flow::kMove) continue;
      } else {
        slot |= slot_units(slot);
      }
      out_.effect_slots.push_back(slot);
    }
    count = static_cast<uint16_t>(out_.effect_slots.size() - first);
  };
  append(reads_, effects.first_read, effects.reads);
  append(writes_, effects.first_write, effects.writes);
}

void FunctionDecoder::decode_form(Decoder& decoder) {
  const ptx::Instruction& ast = decoder.ast;
  std::string name = ast.opcode;
  std::vector<size_t> lengths = {name.size()};
  for (const std::string& modifier : ast.modifiers) {
    name += "." + modifier;
    lengths.push_back(name.size());
  }
  for (size_t taken = lengths.size(); taken-- > 0;) {
    const auto form = forms().find(std::string_view(name).substr(0, lengths[taken]));
    if (form == forms().end()) continue;
    decoder.skip(static_cast<int>(taken));
    form->second(decoder);
    return;
  }
  throw Unsupported("no such opcode");
}

void FunctionDecoder::reads(Slot slot) { reads_.push_back(slot); }

void FunctionDecoder::writes(Slot slot) { writes_.push_back(slot); }

// Size of a register's slot in units of 64 bytes; those of special registers and addresses, which
// are always defined, count as one.
uint32_t FunctionDecoder::slot_units(Slot slot) const {
  const auto found = slot_units_.find(slot);
  return found == slot_units_.end() ? 1 : found->second;
}

Slot FunctionDecoder::constant(uint64_t value, int bytes) {
  if (bytes == 1) value &= 0xff;
  if (bytes == 2) value &= 0xffff;
  if (bytes == 4 || bytes == 0) value &= 0xffffffff;
  const int width = bytes == 8 ? 8 : bytes == 0 ? 0 : 4;
  const auto [entry, is_new] = constants_.try_emplace({value, width}, kNoSlot);
  if (!is_new) return entry->second;
  const size_t offset = out_.constants.size();
  out_.constants.resize(offset + (width == 8 ? 256 : width == 4 ? 128 : kSlotAlignment));
  const int lanes = width == 0 ? 1 : kWarpSize;
  const int lane_bytes = width == 0 ? 4 : width;
  for (int lane = 0; lane < lanes; ++lane) {
    std::memcpy(out_.constants.data() + offset + size_t(lane) * lane_bytes, &value, lane_bytes);
  }
  return entry->second = static_cast<Slot>(offset) | kConstantBit;
}

Slot FunctionDecoder::new_slot(int bytes) {
  const uint32_t offset = aligned(out_.register_bytes, kSlotAlignment);
  out_.register_bytes = offset + (bytes == 8 ? 256 : 128);
  return offset;
}

Slot FunctionDecoder::frame_slot(FrameValue value) {
  const std::string key = format("%d/%d/%d/%lld/%d/", static_cast<int>(value.kind), value.generic,
                                 value.wide, static_cast<long long>(value.offset), value.variable) +
                          value.special;
  const auto [entry, is_new] = frame_slots_.try_emplace(key, kNoSlot);
  if (is_new) {
    entry->second = value.slot = new_slot(value.wide ? 8 : 4);
    out_.frame_values.push_back(std::move(value));
  }
  return entry->second;
}

Slot FunctionDecoder::special(const std::string& name, int bytes) {
  FrameValue value;
  value.kind = FrameValue::Kind::kSpecial;
  value.wide = bytes == 8;
  value.special = name;
  return frame_slot(std::move(value));
}

Slot FunctionDecoder::variable_address(const ptx::Operand& operand, int bytes) {
  if (operand.kind == ptx::Operand::Kind::kFunction) {
    return constant(kFunctionWindow | static_cast<uint64_t>(operand.index), 8);
  }
  using Scope = ptx::Operand::Scope;
  FrameValue value;
  value.wide = bytes == 8;
  value.offset = operand.value;
  if (operand.variable_scope == Scope::kParam && ast_.is_entry) {
    return constant(out_.params.at(operand.index).offset + operand.value, bytes);
  }
  if (operand.variable_scope == Scope::kParam || operand.variable_scope == Scope::kReturn) {
    const auto& list = operand.variable_scope == Scope::kParam ? out_.params : out_.returns;
    value.kind = FrameValue::Kind::kLocal;
    value.offset += list.at(operand.index).offset;
    return frame_slot(value);
  }
  const bool in_function = operand.variable_scope == Scope::kFunction;
  const ptx::Variable& variable =
      in_function ? ast_.variables.at(operand.index) : module_.variables.at(operand.index);
  if (variable.space == ptx::Space::kShared) {
    const int owner = in_function ? index_ : -1;
    for (size_t i = 0; i < program_.shared_variables.size(); ++i) {
      const auto& shared = program_.shared_variables[i];
      if (shared.function == owner && shared.variable == operand.index) {
        value.variable = static_cast<int>(i);
      }
    }
    value.kind = FrameValue::Kind::kShared;
    return frame_slot(value);
  }
  if (in_function) {
    value.kind = FrameValue::Kind::kLocal;
    value.offset += local_offsets_[operand.index];
    return frame_slot(value);
  }
  const int64_t place = program_.variable_offsets[operand.index];
  if (place < 0) throw Unsupported("variable " + variable.name + " is not defined in this module");
  value.kind = FrameValue::Kind::kModule;
  value.offset += place;
  return frame_slot(value);
}

void FunctionDecoder::resolve_control_flow() {
  const std::vector<int> points = ptx::reconvergence_points(ast_);
  for (size_t pc = 0; pc < out_.code.size(); ++pc) {
    const bool inside = points[pc] >= 0 && points[pc] < static_cast<int>(out_.code.size());
    out_.code[pc].reconverge = inside ? static_cast<uint32_t>(points[pc]) : kNoPc;
  }
}

}  // namespace gpu_emulator::exec
