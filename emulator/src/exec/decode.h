#pragma once

// What the decoders of the opcode families share. A family is one file with a table of forms:
//
//   constexpr Form kForms[] = {{"ldmatrix.sync.aligned", decode_ldmatrix}, ...};
//
// The longest form that is a prefix of the opcode with its modifiers decides. A decoder takes the
// modifiers it knows; a modifier left over makes the instruction unsupported.

#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "isa.h"
#include "program.h"

namespace gpu_emulator::exec {

class Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

int size_of(ptx::Type type);  // bytes; predicates and kNone 0
bool is_signed(ptx::Type type);
bool is_float(ptx::Type type);  // any floating type, packed ones included
std::optional<ptx::Type> type_named(std::string_view modifier);

class FunctionDecoder;  // function_decoder.h: slots of registers, constants, special registers

class Decoder {  // of one instruction
 public:
  Decoder(FunctionDecoder& function, const ptx::Instruction& ast, Instruction& out, const Isa& isa);

  const ptx::Instruction& ast;
  Instruction& out;
  const Isa& isa;  // handlers of the instruction set in use

  // Modifiers, from left to right; each may be taken once.
  bool take(std::string_view modifier);
  // The first of these there is: its index here, -1 = none.
  int take_any(std::initializer_list<std::string_view> modifiers);
  ptx::Type take_type();  // the next modifier that names a type; Unsupported if none
  std::optional<ptx::Type> try_take_type();
  std::string take_starting(std::string_view prefix);  // "" = none
  void expect_no_modifiers_left();
  void skip(int modifiers);  // those that the form has matched

  // Operands. `bytes` is what the instruction reads (1, 2, 4, 8); a register of another size is
  // Unsupported unless it is wider where `relaxed` (ld, st, cvt).
  size_t operands() const { return ast.operands.size(); }
  const ptx::Operand& operand(size_t i) const;
  Slot source(const ptx::Operand& operand, ptx::Type type, bool relaxed = false);
  Slot source(size_t i, ptx::Type type, bool relaxed = false);
  Slot source_predicate(const ptx::Operand& operand, bool* negated);
  // A register with room for `bytes` (0: a predicate). kNoSlot = the sink, where it may be one.
  Slot destination(const ptx::Operand& operand, int bytes, bool may_sink = false);
  Slot destination(size_t i, int bytes, bool may_sink = false);
  int register_bytes(const ptx::Operand& operand) const;  // 0 = predicate; -1 = not a register
  int64_t immediate(size_t i) const;                      // Unsupported if it is not one
  std::vector<ptx::Operand> elements(const ptx::Operand& operand) const;  // of {..}, or itself

  // [base + offset]: slot, offset and whether the base has 64 bits.
  struct Address {
    Slot slot;
    int64_t offset;
    bool wide;
  };
  Address address(const ptx::Operand& operand);
  void set_address(const ptx::Operand& operand);  // out.a, out.imm, out.wide_address

  void list(const std::vector<Slot>& slots);  // out.list, out.count
  void memory_order();  // .relaxed/.acquire/... and scopes: out.order, out.scope
  Space take_space();   // generic if there is none

  FunctionDecoder& function;

 private:
  std::vector<bool> taken_;
};

using DecodeForm = void (*)(Decoder&);
struct Form {
  std::string_view opcode;  // "mma.sync.aligned"
  DecodeForm decode;
};

// The families' tables.
std::span<const Form> arithmetic_forms();  // add, sub, mul, mad, fma, min, max, ... of all types
std::span<const Form> integer_forms();
std::span<const Form> float_forms();
std::span<const Form> compare_forms();
std::span<const Form> convert_forms();
std::span<const Form> move_forms();
std::span<const Form> memory_forms();
std::span<const Form> atomic_forms();
std::span<const Form> warp_forms();
std::span<const Form> control_forms();
std::span<const Form> barrier_forms();
std::span<const Form> mma_forms();
std::span<const Form> copy_forms();
// sm_90
std::span<const Form> mbarrier_forms();
std::span<const Form> bulk_forms();
std::span<const Form> tensor_forms();
std::span<const Form> wgmma_forms();
std::span<const Form> cluster_forms();
std::span<const Form> stmatrix_forms();

}  // namespace gpu_emulator::exec
