#include "function_decoder.h"

namespace gpu_emulator::exec {

RegisterAssignment assign_registers(const ptx::Function& function) {
  RegisterAssignment result;
  for (const ptx::Register& reg : function.registers) {
    const int bytes = size_of(reg.type);
    result.slots.push_back(result.bytes);
    result.bytes += bytes == 16 ? 512 : bytes == 8 ? 256 : bytes == 0 ? 64 : 128;
  }
  return result;
}

}  // namespace gpu_emulator::exec
