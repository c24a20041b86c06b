#pragma once

// Handlers compiled once per instruction set: the lane loops of the ALU and the matrix products.
// isa_baseline.cpp, isa_avx2.cpp and isa_avx512.cpp include the same implementation (lanes.inc.h,
// matrix.inc.h) in a namespace each; results are the same bits in all of them.

#include <cstdint>
#include <vector>

#include "program.h"

namespace gpu_emulator::exec {

enum class LaneOp : uint8_t {
  // Integers, T d = a op b. kMulWide: d has twice the width.
  kAdd,
  kSub,
  kMulLo,
  kMulHi,
  kMulWide,
  kMadLo,
  kMadHi,
  kMadWide,
  kMin,
  kMax,
  kAbs,
  kNeg,
  kAnd,
  kOr,
  kXor,
  kNot,
  kCnot,
  kShl,
  kShr,
  kLop3,  // imm: table
  kMov,
  kSelect,  // c: predicate
  // Floats, also with LaneForm::ftz and saturate.
  kFma,
  kSqrt,  // approximate ones: within the error bounds of the PTX ISA
  kRsqrt,
  kRcp,
  kEx2,
  kLg2,
  kSin,
  kCos,
  kTanh,
  kDiv,
  // Comparisons to a predicate mask, LaneForm::compare; e: second destination, c: combined with.
  kSetp,
  // Conversions that kernels' inner loops use; LaneForm::type is the result.
  kPackBf16x2,  // from two f32, round to nearest even
  kPackF16x2,
  kWiden,       // 32 to 64 bits, by the signedness of `type`
  kNarrow,      // 64 to 32 bits
  kPack2x32,    // mov.b64 d, {a, b}
  kUnpack2x32,  // mov.b64 {d, e}, a
  kPack2x16,
  kUnpack2x16,
};

struct LaneForm {
  LaneOp op;
  ptx::Type type = ptx::Type::kB32;
  bool ftz = false;
  bool saturate = false;
  Compare compare = Compare::kEq;
};

// mma.sync m16n8kK with 32-bit accumulators. Slots in Function::lists: D, A, B, C.
struct MatrixForm {
  MatrixType a, b;
  int k;
};

// wgmma: operands are widened to panels of 32-bit elements, in a layout of the instruction set's
// own (warpgroup.inc.h), then multiplied for one warp's 16 rows at a time.
struct PanelForm {  // of the chunks that operand_chunks() (wgmma_operand.h) lists
  bool mn_major, negate;
  int rows;
};
// panel: 64-byte aligned; of A (rows = 16) 64 k elements of 32 bits, of B rows k.
using PackPanel = void (*)(const std::byte* const* chunks, const PanelForm& form, void* panel);

struct TilePanels {
  const void *a, *b;
  int n, k;
};
// d: registers of 32 lanes, in the order of PTX; !accumulate: D = A B.
using TileProduct = void (*)(uint32_t* const* d, const TilePanels& panels, bool accumulate);

struct Isa {
  const char* name;
  Handler (*lanes)(const LaneForm& form);     // nullptr: not one of these
  Handler (*matrix)(const MatrixForm& form);  // nullptr: not one of these
  PackPanel (*pack_a)(MatrixType type);
  PackPanel (*pack_b)(MatrixType type);
  TileProduct (*tile_product)(AccumulatorType type);
};
const Isa& best_isa();                     // of this machine
std::vector<const Isa*> available_isas();  // of this machine, the baseline first

}  // namespace gpu_emulator::exec
