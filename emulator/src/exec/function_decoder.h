#pragma once

// The register file and constant pool of one function while it is decoded.

#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "decode.h"

namespace gpu_emulator::exec {

// Slots of the function's virtual registers.
struct RegisterAssignment {
  std::vector<Slot> slots;  // by ptx::Function::registers
  uint32_t bytes = 0;
  int max_live = 0;  // 32-bit registers alive at once
};

// Whether frames have a value of the special register: frames.cpp. The clocks are not among them.
bool has_special_register(const std::string& name);

uint32_t register_slot_bytes(ptx::Type type);

// A slot for each register.
RegisterAssignment separate_registers(const ptx::Function& function);

// Registers that are never alive at once share a slot, which keeps a warp's registers in the
// cache. `decoded` is the function with separate_registers().
RegisterAssignment share_registers(const ptx::Function& function, const Function& decoded,
                                   const RegisterAssignment& separate);

class FunctionDecoder {
 public:
  FunctionDecoder(const ptx::Module& module, int index, const Program& program, Function& out);

  // Decodes every instruction; call once.
  void run(const Isa& isa);

  Slot register_slot(int index) const { return register_slots_[index]; }
  Slot constant(uint64_t value, int bytes);  // 1, 2, 4, 8; 0: predicate, value = lanes' mask
  Slot special(const std::string& name, int bytes);
  Slot variable_address(const ptx::Operand& operand, int bytes);  // also functions
  const ptx::Module& module() const { return module_; }
  const ptx::Function& ast() const { return ast_; }
  Function& out() { return out_; }

  void reads(Slot slot);  // by the instruction being decoded
  void writes(Slot slot);

 private:
  void layout_local();
  void use(const RegisterAssignment& registers);
  void decode_all(const Isa& isa);
  void decode_one(size_t pc, const Isa& isa);
  void decode_form(Decoder& decoder);
  void resolve_control_flow();
  Slot frame_slot(FrameValue value);
  Slot new_slot(int bytes);
  uint32_t slot_units(Slot slot) const;

  const ptx::Module& module_;
  const ptx::Function& ast_;
  const Program& program_;
  Function& out_;
  int index_;
  std::vector<Slot> register_slots_;
  std::unordered_map<Slot, uint32_t> slot_units_;
  std::vector<uint32_t> local_offsets_;  // by ptx::Function::variables; .shared ones unused
  std::map<std::pair<uint64_t, int>, Slot> constants_;
  std::map<std::string, Slot> frame_slots_;
  std::vector<Slot> reads_, writes_;
};

}  // namespace gpu_emulator::exec
