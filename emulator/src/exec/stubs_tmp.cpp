#include "families.h"
namespace gpu_emulator::exec {
void decode_half(Decoder&, LaneOp, ptx::Type) { throw Unsupported("half"); }
Handler rounded_handler(LaneOp, ptx::Type, bool, bool) { return nullptr; }
std::span<const Form> atomic_forms() { return {}; }
}
