// Decoder: the modifiers and operands of one instruction.

#include <algorithm>
#include <bit>
#include <unordered_map>

#include "function_decoder.h"
#include "memory.h"

namespace gpu_emulator::exec {

using ptx::Operand;
using ptx::Type;

int size_of(Type type) { return static_cast<int>(ptx::type_bytes(type)); }

bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

bool is_float(Type type) {
  switch (type) {
    case Type::kF16:
    case Type::kF16x2:
    case Type::kBf16:
    case Type::kBf16x2:
    case Type::kF32:
    case Type::kF32x2:
    case Type::kF64:
      return true;
    default:
      return false;
  }
}

std::optional<Type> type_named(std::string_view modifier) {
  static const std::unordered_map<std::string_view, Type> names = {
      {"pred", Type::kPred},   {"b8", Type::kB8},       {"b16", Type::kB16},
      {"b32", Type::kB32},     {"b64", Type::kB64},     {"b128", Type::kB128},
      {"u8", Type::kU8},       {"u16", Type::kU16},     {"u32", Type::kU32},
      {"u64", Type::kU64},     {"s8", Type::kS8},       {"s16", Type::kS16},
      {"s32", Type::kS32},     {"s64", Type::kS64},     {"f16", Type::kF16},
      {"f16x2", Type::kF16x2}, {"bf16", Type::kBf16},   {"bf16x2", Type::kBf16x2},
      {"f32", Type::kF32},     {"f32x2", Type::kF32x2}, {"f64", Type::kF64}};
  const auto found = names.find(modifier);
  if (found == names.end()) return std::nullopt;
  return found->second;
}

Decoder::Decoder(FunctionDecoder& function, const ptx::Instruction& ast, Instruction& out,
                 const Isa& isa)
    : ast(ast), out(out), isa(isa), function(function), taken_(ast.modifiers.size(), false) {}

bool Decoder::take(std::string_view modifier) {
  for (size_t i = 0; i < taken_.size(); ++i) {
    if (!taken_[i] && ast.modifiers[i] == modifier) return taken_[i] = true;
  }
  return false;
}

int Decoder::take_any(std::initializer_list<std::string_view> modifiers) {
  for (size_t i = 0; i < taken_.size(); ++i) {
    const auto found = std::find(modifiers.begin(), modifiers.end(), ast.modifiers[i]);
    if (taken_[i] || found == modifiers.end()) continue;
    taken_[i] = true;
    return static_cast<int>(found - modifiers.begin());
  }
  return -1;
}

std::optional<Type> Decoder::try_take_type() {
  for (size_t i = 0; i < taken_.size(); ++i) {
    if (taken_[i]) continue;
    if (const auto type = type_named(ast.modifiers[i])) {
      taken_[i] = true;
      return type;
    }
  }
  return std::nullopt;
}

Type Decoder::take_type() {
  const auto type = try_take_type();
  if (!type) throw Unsupported("no type");
  return *type;
}

std::string Decoder::take_starting(std::string_view prefix) {
  for (size_t i = 0; i < taken_.size(); ++i) {
    if (!taken_[i] && ast.modifiers[i].starts_with(prefix)) {
      taken_[i] = true;
      return ast.modifiers[i];
    }
  }
  return "";
}

void Decoder::skip(int modifiers) {
  for (int i = 0; i < modifiers; ++i) taken_[i] = true;
}

void Decoder::expect_no_modifiers_left() {
  for (size_t i = 0; i < taken_.size(); ++i) {
    if (!taken_[i]) throw Unsupported("modifier ." + ast.modifiers[i]);
  }
}

const Operand& Decoder::operand(size_t i) const {
  if (i >= ast.operands.size()) throw Unsupported("too few operands");
  return ast.operands[i];
}

int Decoder::register_bytes(const Operand& operand) const {
  if (operand.kind != Operand::Kind::kRegister) return -1;
  const Type type = function.ast().registers[operand.index].type;
  return type == Type::kPred ? 0 : size_of(type);
}

namespace {

uint64_t immediate_bits(const Operand& operand, Type type) {
  const auto bits = static_cast<uint64_t>(operand.value);
  if (!operand.is_float) {
    if (type == Type::kF32) return std::bit_cast<uint32_t>(static_cast<float>(operand.value));
    if (type == Type::kF64) return std::bit_cast<uint64_t>(static_cast<double>(operand.value));
    return bits;
  }
  const double value = operand.is_f32 ? std::bit_cast<float>(static_cast<uint32_t>(bits))
                                      : std::bit_cast<double>(bits);
  if (size_of(type) == 8) return operand.is_f32 ? std::bit_cast<uint64_t>(value) : bits;
  if (operand.is_f32) return bits & 0xffffffffu;
  return std::bit_cast<uint32_t>(static_cast<float>(value));
}

bool is_dynamic_special(std::string_view name) {
  return name.starts_with("%clock") || name.starts_with("%globaltimer");
}

}  // namespace

Slot Decoder::source(const Operand& operand, Type type, bool relaxed) {
  const int bytes = type == Type::kPred ? 0 : size_of(type);
  switch (operand.kind) {
    case Operand::Kind::kRegister: {
      const int have = register_bytes(operand);
      const bool fits = have == bytes || (bytes == 1 && have > 0 && have < 8) ||
                        (relaxed && have > bytes && bytes > 0);
      if (!fits) throw Unsupported("operand of another size");
      const Slot slot = function.register_slot(operand.index);
      function.reads(slot);
      return slot;
    }
    case Operand::Kind::kImmediate: {
      if (bytes == 0) return function.constant(operand.value ? kAllLanes : 0, 0);
      return function.constant(immediate_bits(operand, type), bytes);
    }
    case Operand::Kind::kSpecial:
      if (is_dynamic_special(operand.name)) throw Unsupported(operand.name + " outside mov");
      if (!has_special_register(operand.name)) throw Unsupported(operand.name);
      return function.special(operand.name, bytes);
    case Operand::Kind::kVariable:
    case Operand::Kind::kFunction:
      return function.variable_address(operand, bytes);
    default:
      throw Unsupported("operand of this kind");
  }
}

Slot Decoder::source(size_t i, Type type, bool relaxed) {
  return source(operand(i), type, relaxed);
}

Slot Decoder::source_predicate(const Operand& operand, bool* negated) {
  *negated = operand.negated;
  return source(operand, Type::kPred);
}

Slot Decoder::destination(const Operand& operand, int bytes, bool may_sink) {
  if (operand.kind == Operand::Kind::kSink && may_sink) return kNoSlot;
  if (operand.kind != Operand::Kind::kRegister) throw Unsupported("destination is no register");
  auto container = [](int size) { return size == 0 ? 0 : std::max(size, 4); };
  if (container(register_bytes(operand)) != container(bytes)) {
    throw Unsupported("destination of another size");
  }
  const Slot slot = function.register_slot(operand.index);
  function.writes(slot);
  return slot;
}

Slot Decoder::destination(size_t i, int bytes, bool may_sink) {
  return destination(operand(i), bytes, may_sink);
}

int64_t Decoder::immediate(size_t i) const {
  const Operand& value = operand(i);
  if (value.kind != Operand::Kind::kImmediate || value.is_float) {
    throw Unsupported("operand that must be a constant is none");
  }
  return value.value;
}

std::vector<Operand> Decoder::elements(const Operand& operand) const {
  if (operand.kind == Operand::Kind::kVector || operand.kind == Operand::Kind::kPair) {
    return operand.elements;
  }
  return {operand};
}

Decoder::Address Decoder::address(const Operand& operand) {
  const bool bracketed = operand.kind == Operand::Kind::kMemory;
  const Operand& base = bracketed ? operand.elements.at(0) : operand;
  int64_t offset = bracketed ? operand.value : 0;
  if (base.kind == Operand::Kind::kRegister) {
    const int bytes = register_bytes(base);
    if (bytes != 4 && bytes != 8) throw Unsupported("address register of this size");
    const Slot slot = function.register_slot(base.index);
    function.reads(slot);
    return {slot, offset, bytes == 8};
  }
  if (base.kind == Operand::Kind::kImmediate) {
    return {function.constant(static_cast<uint64_t>(base.value), 8), offset, true};
  }
  if (base.kind == Operand::Kind::kVariable) {
    return {function.variable_address(base, 8), offset, true};
  }
  throw Unsupported("address of this kind");
}

void Decoder::set_address(const Operand& operand) {
  const Address found = address(operand);
  out.a = found.slot;
  out.imm = found.offset;
  out.wide_address = found.wide;
}

void Decoder::list(const std::vector<Slot>& slots) {
  std::vector<Slot>& lists = function.out().lists;
  out.list = static_cast<uint32_t>(lists.size());
  out.count = static_cast<uint16_t>(slots.size());
  lists.insert(lists.end(), slots.begin(), slots.end());
}

void Decoder::memory_order() {
  constexpr Order kOrders[] = {Order::kWeak,    Order::kVolatile, Order::kRelaxed, Order::kAcquire,
                               Order::kRelease, Order::kAcqRel,   Order::kSeqCst,  Order::kRelaxed};
  const int order =
      take_any({"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc", "mmio"});
  if (order >= 0) out.order = kOrders[order];
  constexpr Scope kScopes[] = {Scope::kCta, Scope::kCluster, Scope::kGpu, Scope::kSys};
  const int scope = take_any({"cta", "cluster", "gpu", "sys"});
  if (scope >= 0) out.scope = kScopes[scope];
}

Space Decoder::take_space() {
  if (take_any({"global", "const"}) >= 0) return Space::kGlobal;
  if (take_any({"shared", "shared::cta", "shared::cluster"}) >= 0) return Space::kShared;
  if (take("local")) return Space::kLocal;
  if (take_any({"param", "param::entry", "param::func"}) >= 0) return Space::kParam;
  return Space::kGeneric;
}

}  // namespace gpu_emulator::exec
