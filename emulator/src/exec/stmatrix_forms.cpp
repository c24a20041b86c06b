// stmatrix of 8 x 8 matrices of 16 bits (PTX 9.7.14.5.16).

#include <cstring>

#include "decode.h"
#include "function_decoder.h"
#include "memory.h"

namespace gpu_emulator::exec {
namespace {

constexpr int kRows = 8;
constexpr uint32_t kRowBytes = 16;

// Row r of a matrix is lanes 4 r ... 4 r + 3 of its register, two elements each; of the transposed
// one, element r of every column.
void store_row(const uint32_t* reg, int row, bool transposed, std::byte* host) {
  if (!transposed) {
    std::memcpy(host, reg + 4 * row, kRowBytes);
    return;
  }
  uint16_t elements[kRows];
  for (int i = 0; i < kRows; ++i) {
    elements[i] = static_cast<uint16_t>(reg[4 * i + row / 2] >> (row % 2 * 16));
  }
  std::memcpy(host, elements, kRowBytes);
}

// list: one register a matrix.
Step run_stmatrix(Warp& warp, const Instruction& in, uint32_t mask) {
  require_whole_warp(warp, mask, "stmatrix");
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  AccessForm form;
  form.space = in.space;
  form.kind = AccessKind::kStore;
  form.bytes = form.alignment = kRowBytes;
  const int lanes = kRows * in.count;
  resolve(warp, form, lanes == kWarpSize ? kAllLanes : (1u << lanes) - 1, address, host);
  const bool transposed = options<MatrixMoveOptions>(in).transposed;
  for (int i = 0; i < lanes; ++i) {
    store_row(warp.lanes<uint32_t>(warp.list(in)[i / kRows]), i % kRows, transposed, host[i]);
  }
  return Step::kNext;
}

void decode_stmatrix(Decoder& decoder) {
  if (!decoder.take("m8n8")) throw Unsupported("matrices of this shape");
  constexpr int kCounts[] = {1, 2, 4};
  const int count = decoder.take_any({"x1", "x2", "x4"});
  if (count < 0) throw Unsupported("number of matrices");
  make_options<MatrixMoveOptions>(decoder.out).transposed = decoder.take("trans");
  decoder.out.space = decoder.take_space();
  if (!decoder.take("b16")) throw Unsupported("elements of this type");
  decoder.set_address(decoder.operand(0));
  std::vector<Slot> slots;
  for (const ptx::Operand& reg : decoder.elements(decoder.operand(1))) {
    slots.push_back(decoder.source(reg, ptx::Type::kB32));
  }
  if (static_cast<int>(slots.size()) != kCounts[count]) throw Unsupported("number of registers");
  decoder.list(slots);
  decoder.out.counter_class = InstructionClass::kMatrixMove;
  decoder.out.run = run_stmatrix;
}

constexpr Form kForms[] = {{"stmatrix.sync.aligned", decode_stmatrix}};

}  // namespace

std::span<const Form> stmatrix_forms() { return kForms; }

}  // namespace gpu_emulator::exec
