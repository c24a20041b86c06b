#pragma once

// wgmma (PTX 9.7.15): the four warps of a warpgroup issue each operation together, though here one
// after the other. It reads its operands in shared memory when all four have issued it (eager), or
// when the first of them waits for it (late); its registers change for each warp when that warp
// waits.

#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <vector>

#include "isa.h"
#include "registers_in_flight.h"

namespace gpu_emulator::exec {

struct Warp;

inline constexpr int kWarpgroupWarps = 4;
inline constexpr int kARegisters = 4;  // of A in registers

struct WgmmaShape {
  int n = 0, k = 0;
  MatrixType a = MatrixType::kF16, b = MatrixType::kF16;
  AccumulatorType d = AccumulatorType::kF32;
  bool a_in_registers = false;
  bool a_mn_major = false, b_mn_major = false;
  bool negate_a = false, negate_b = false;

  int d_registers() const { return d == AccumulatorType::kF16 ? n / 4 : n / 2; }
};

// How an instruction holds a shape: imm n; bytes k; WgmmaOptions. list: D, then A if it is in
// registers; a, b: descriptors; c: scale-d.
void set_shape(Instruction& in, const WgmmaShape& shape);
WgmmaShape shape_of(const Instruction& in);

struct WgmmaAccumulators {  // of one warp's part
  const Instruction* instruction = nullptr;
  const Function* function = nullptr;
  const std::byte* frame = nullptr;
};

struct WgmmaPart {  // of one warp
  Warp* warp = nullptr;
  std::byte* frame = nullptr;  // its registers
  uint32_t group = 0;          // the warp's commit_groups before it
  // In late and random modes: the registers' values, by the instruction's list; null: a constant,
  // or a register in another role.
  std::vector<RegistersInFlight::Value*> in_flight;
};

struct WgmmaOperation {
  const Instruction* instruction = nullptr;
  const Function* function = nullptr;
  uint32_t pc = 0;
  uint64_t a = 0, b = 0;  // descriptors
  bool accumulate = false;
  bool computed = false, shown = false;
  std::array<WgmmaPart, kWarpgroupWarps> parts;
  uint32_t issued = 0;   // bit = warp of the group
  uint32_t retired = 0;  // bit = warp that has waited for it
  // Rows of A and columns of B with undefined values in shared memory, found when it is complete.
  std::bitset<64> undefined_rows;
  std::bitset<256> undefined_columns;
};

struct Warpgroup {
  struct WarpState {
    uint64_t issued = 0;        // operations
    uint32_t groups = 0;        // commit_group executed
    bool fenced = false;        // wgmma.fence since the last wait that retired an operation
    WgmmaAccumulators retired;  // of the last one
  };
  std::deque<WgmmaOperation> operations;  // that not all four warps have waited for
  uint64_t first = 0;                     // number of operations[0]
  std::array<WarpState, kWarpgroupWarps> warps;
};

// D = A B (+ D) of all four warps.
void compute(WgmmaOperation& operation, const Isa& isa);

// Shows the operands in shared memory to the observer, as issued (async_begins) or complete.
void show_operands(WgmmaOperation& operation, bool complete);

}  // namespace gpu_emulator::exec
