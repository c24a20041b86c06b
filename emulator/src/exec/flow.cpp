#include "flow.h"

#include <algorithm>
#include <string_view>
#include <unordered_map>

namespace gpu_emulator::exec {
namespace {

bool has(const ptx::Instruction& ast, std::string_view modifier) {
  return std::find(ast.modifiers.begin(), ast.modifiers.end(), modifier) != ast.modifiers.end();
}

enum : uint8_t { kAnd = 1, kOr = 2, kLeft = 1, kRight = 2 };  // Effects::bits

uint8_t bits_of_move(const ptx::Instruction& ast) {
  const std::string& type = ast.modifiers.empty() ? ast.opcode : ast.modifiers.back();
  const size_t digits = type.find_first_of("0123456789");
  if (digits == std::string::npos) return 0;
  return static_cast<uint8_t>(std::stoi(type.substr(digits)));
}

const std::unordered_map<std::string_view, Flow>& flows() {
  static const auto* const table = new std::unordered_map<std::string_view, Flow>{
      {"mov", Flow::kMove},
      {"selp", Flow::kSelect},
      {"and", Flow::kLogic},
      {"or", Flow::kLogic},
      {"shl", Flow::kShift},
      {"shr", Flow::kShift},
      {"shfl", Flow::kShuffle},
      {"vote", Flow::kLanes},
      {"match", Flow::kLanes},
      {"redux", Flow::kLanes},
      {"ld", Flow::kLoad},
      {"ldu", Flow::kLoad},
      {"ldmatrix", Flow::kLoadMatrix},
      {"st", Flow::kStore},
      {"stmatrix", Flow::kStoreMatrix},
      {"atom", Flow::kAtomic},
      {"red", Flow::kAtomic},
      {"mma", Flow::kMatrix},
      {"wgmma", Flow::kNone},
      {"call", Flow::kNone},
      {"prefetch", Flow::kNone},
      {"prefetchu", Flow::kNone},
      {"bar", Flow::kAddress},
      {"barrier", Flow::kAddress},
      {"bra", Flow::kAddress},
      {"brx", Flow::kAddress},
      {"cp", Flow::kAddress},
      {"mbarrier", Flow::kAddress},
      {"setmaxnreg", Flow::kAddress},
  };
  return *table;
}

}  // namespace

void set_flow(const ptx::Instruction& ast, Effects& effects) {
  const auto found = flows().find(ast.opcode);
  effects.flow = found == flows().end() ? Flow::kUnion : found->second;
  if (effects.flow == Flow::kMove) {
    effects.bits = bits_of_move(ast);
    if (effects.bits % 16) effects.flow = Flow::kUnion;
  } else if (effects.flow == Flow::kLoadMatrix && has(ast, "trans")) {
    effects.flow = Flow::kLoadMatrixTransposed;
  } else if (effects.flow == Flow::kMatrix && !has(ast, "m16n8k16") && !has(ast, "m16n8k8") &&
             !has(ast, "m16n8k32")) {
    effects.flow = Flow::kLanes;
  } else if (has(ast, "f16x2") || has(ast, "bf16x2")) {
    if (ast.opcode != "cvt") {
      effects.flow = Flow::kHalves;
    } else if (has(ast, "f32")) {
      effects.flow = Flow::kPackHalves;
    }
  }
  if (ast.opcode == "wgmma" && has(ast, "mma_async")) effects.flow = Flow::kWarpgroupMatrix;
  if (effects.flow == Flow::kAtomic) effects.bits = has(ast, "exch");
  if (effects.flow == Flow::kLogic) effects.bits = ast.opcode == "and" ? kAnd : kOr;
  if (effects.flow == Flow::kShift) effects.bits = ast.opcode == "shl" ? kLeft : kRight;
  const bool stops = ast.opcode == "ret" || ast.opcode == "exit" || ast.opcode == "trap" ||
                     ast.opcode == "bra" || ast.opcode == "brx";
  effects.ends_flow = stops && ast.guard < 0;
}

}  // namespace gpu_emulator::exec
