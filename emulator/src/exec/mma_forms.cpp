// ldmatrix, movmatrix and mma.sync (PTX 9.7.14.5). The products themselves are in matrix.inc.h.

#include <cstring>

#include "decode.h"
#include "function_decoder.h"
#include "memory.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Type;

constexpr int kRows = 8;
constexpr int kRowBytes = 16;

// Lane l of a matrix's register: row l / 4, bytes 4 (l % 4) on.
void spread_rows(std::byte* const* row, uint32_t* out) {
  for (int r = 0; r < kRows; ++r) std::memcpy(out + 4 * r, row[r], kRowBytes);
}

using Row = uint16_t __attribute__((vector_size(kRowBytes)));

// Rows i and i + 4 interleaved, for each i: three times over, the transposed matrix.
inline void interleave(Row (&x)[kRows]) {
  Row y[kRows];
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = __builtin_shufflevector(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
    y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
  }
  std::memcpy(x, y, sizeof(x));
}

// Transposed: lane l has rows 2 (l % 4) and the next one of column l / 4, 16-bit elements.
void spread_columns(std::byte* const* row, uint32_t* out) {
  Row x[kRows];
  for (int r = 0; r < kRows; ++r) std::memcpy(&x[r], row[r], kRowBytes);
  for (int round = 0; round < 3; ++round) interleave(x);
  std::memcpy(out, x, sizeof(x));
}

// Lane 8 m + r gives the address of row r of matrix m.
Step run_ldmatrix(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask != kAllLanes) require_whole_warp(warp, mask, "ldmatrix");
  const int lanes = kRows * in.count;
  const uint32_t addressing = lanes == kWarpSize ? kAllLanes : (1u << lanes) - 1;
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  addresses(warp, in.a, in.wide_address, in.imm, address);
  AccessForm form;
  form.space = in.space;
  form.bytes = form.alignment = kRowBytes;
  resolve(warp, form, addressing, address, host);
  for (int m = 0; m < in.count; ++m) {
    const Slot slot = warp.list(in)[m];
    if (slot == kNoSlot) continue;
    uint32_t* d = warp.lanes<uint32_t>(slot);
    if (options<MatrixMoveOptions>(in).transposed) {
      spread_columns(host + kRows * m, d);
    } else {
      spread_rows(host + kRows * m, d);
    }
  }
  return Step::kNext;
}

void decode_ldmatrix(Decoder& decoder) {
  Instruction& out = decoder.out;
  if (!decoder.take("m8n8")) throw Unsupported("matrices of this shape");
  constexpr int kCounts[] = {1, 2, 4};
  const int count = decoder.take_any({"x1", "x2", "x4"});
  if (count < 0) throw Unsupported("number of matrices");
  make_options<MatrixMoveOptions>(out).transposed = decoder.take("trans");
  out.space = decoder.take_space();
  if (!decoder.take("b16")) throw Unsupported("elements of this type");
  const auto registers = decoder.elements(decoder.operand(0));
  if (static_cast<int>(registers.size()) != kCounts[count]) {
    throw Unsupported("vector of another length");
  }
  std::vector<Slot> slots;
  for (const auto& reg : registers) slots.push_back(decoder.destination(reg, 4, true));
  decoder.list(slots);
  decoder.set_address(decoder.operand(1));
  out.run = run_ldmatrix;
  out.counter_class = InstructionClass::kMatrixMove;
}

Step run_movmatrix(Warp& warp, const Instruction& in, uint32_t mask) {
  require_converged(warp, mask, "movmatrix");
  uint32_t source[kWarpSize];
  std::byte* row[kRows];
  std::memcpy(source, warp.lanes<uint32_t>(in.a), sizeof(source));
  for (int r = 0; r < kRows; ++r) row[r] = reinterpret_cast<std::byte*>(source + 4 * r);
  spread_columns(row, warp.lanes<uint32_t>(in.d));
  return Step::kNext;
}

void decode_movmatrix(Decoder& decoder) {
  decoder.take("m8n8");
  decoder.take("trans");
  decoder.take("b16");
  decoder.out.d = decoder.destination(0, 4);
  decoder.out.a = decoder.source(1, Type::kB32);
  decoder.out.run = run_movmatrix;
  decoder.out.counter_class = InstructionClass::kMatrixMove;
}

// --------------------------------------------------------------------------------------------- mma

struct Shape {
  const char* name;
  int k;
};
constexpr Shape kShapes[] = {{"m16n8k4", 4}, {"m16n8k8", 8}, {"m16n8k16", 16}, {"m16n8k32", 32}};

MatrixType matrix_type(Decoder& decoder) {
  constexpr MatrixType kTypes[] = {MatrixType::kF16,  MatrixType::kBf16, MatrixType::kTf32,
                                   MatrixType::kE4m3, MatrixType::kE5m2, MatrixType::kS8,
                                   MatrixType::kU8};
  const int type = decoder.take_any({"f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8"});
  if (type < 0) throw Unsupported("matrix of this type");
  return kTypes[type];
}

int bits_of(MatrixType type) {
  switch (type) {
    case MatrixType::kTf32:
      return 32;
    case MatrixType::kF16:
    case MatrixType::kBf16:
      return 16;
    default:
      return 8;
  }
}

// Registers of the operand, all of 32 bits.
std::vector<Slot> registers(Decoder& decoder, size_t operand, size_t count, bool is_destination) {
  const auto list = decoder.elements(decoder.operand(operand));
  if (list.size() != count) throw Unsupported("fragment of another length");
  std::vector<Slot> slots;
  for (const auto& reg : list) {
    slots.push_back(is_destination ? decoder.destination(reg, 4) : decoder.source(reg, Type::kB32));
  }
  return slots;
}

void decode_mma(Decoder& decoder) {
  Instruction& out = decoder.out;
  int k = 0;
  for (const Shape& shape : kShapes) {
    if (decoder.take(shape.name)) k = shape.k;
  }
  if (!k) throw Unsupported("shape");
  if (!decoder.take("row") || !decoder.take("col")) throw Unsupported("layout");
  const bool integer = decoder.take("s32");
  if (!integer && !decoder.take("f32")) throw Unsupported("accumulator of this type");
  const MatrixType a = matrix_type(decoder), b = matrix_type(decoder);
  if (!decoder.take(integer ? "s32" : "f32")) throw Unsupported("accumulator of this type");
  if (decoder.take("satfinite")) throw Unsupported("saturation");
  const int bits = bits_of(a);
  if (bits != bits_of(b)) throw Unsupported("operands of different sizes");
  const int per_register = 4 * 32 / bits;  // values of k in one register of the quad
  const int blocks = k / per_register;
  if (blocks < 1 || blocks > 2) throw Unsupported("shape of this type");
  if (integer != (a == MatrixType::kS8 || a == MatrixType::kU8)) throw Unsupported("types");
  std::vector<Slot> slots = registers(decoder, 0, 4, true);
  const auto append = [&](size_t operand, size_t count) {
    const std::vector<Slot> more = registers(decoder, operand, count, false);
    slots.insert(slots.end(), more.begin(), more.end());
  };
  append(1, 2 * blocks);
  append(2, blocks);
  append(3, 4);
  decoder.list(slots);
  out.run = decoder.isa.matrix({a, b, k});
  if (!out.run) throw Unsupported("combination of types");
  out.counter_class = InstructionClass::kTensor;
}

constexpr Form kForms[] = {
    {"ldmatrix.sync.aligned", decode_ldmatrix},
    {"movmatrix.sync.aligned", decode_movmatrix},
    {"mma.sync.aligned", decode_mma},
};

}  // namespace

std::span<const Form> mma_forms() { return kForms; }

}  // namespace gpu_emulator::exec
