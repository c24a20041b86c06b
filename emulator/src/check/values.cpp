#include "values.h"

#include "../exec/cta.h"
#include "../exec/wgmma.h"
#include "assignment.h"

namespace gpu_emulator::check {

using exec::Effects;
using exec::Flow;
using exec::Frame;
using exec::Function;
using exec::Instruction;
using exec::kConstantBit;
using exec::kEffectSizeMask;
using exec::kNoSlot;
using exec::kWarpSize;
using exec::Slot;
using exec::Warp;

namespace {

std::vector<uint64_t> places_of(const Function& function) {
  std::vector<uint64_t> places(function.code.size());
  for (size_t pc = 0; pc < places.size(); ++pc) {
    const Effects& effects = function.effects[pc];
    auto add = [&](uint32_t first, uint32_t count) {
      for (uint32_t i = first; i < first + count; ++i) {
        const Slot slot = function.effect_slots[i];
        if (slot == kNoSlot || slot & kConstantBit) continue;
        for (uint32_t k = 0; k < (slot & kEffectSizeMask); ++k) {
          places[pc] |= place_of(slot / kUnitBytes + k);
        }
      }
    };
    add(effects.first_read, effects.reads);
    add(effects.first_write, effects.writes);
  }
  return places;
}

}  // namespace

Values::Values(const exec::Program& program) : functions_(program.functions.data()) {
  for (const Function& function : program.functions) {
    places_.push_back(places_of(function));
    if (function.has_body && !function.code.empty()) {
      unassigned_[&function] = unassigned_words(function);
    }
  }
}

void Values::begin_function(Warp& warp) {
  const auto found = unassigned_.find(warp.function);
  Frame& frame = warp.frames[warp.fragment().frame];
  if (found == unassigned_.end() || found->second.empty() || !frame.undefined.empty()) {
    return;
  }
  frame.undefined.assign(warp.function->register_bytes / kUnitBytes + 8, 0);
  for (uint32_t word : found->second) {
    frame.undefined[word] = exec::kAllLanes;
    state_of(warp).undefined_places |= place_of(word);
  }
}

namespace {

// stmatrix: the lane's address is that of row lane % 8 of matrix lane / 8 (PTX 9.7.14.5.16).
uint64_t stored_row(const Warp& warp, const Frame& frame, int lane) {
  const Instruction& in = warp.function->code[warp.pc];
  const Slot slot = warp.list(in)[lane / 8];
  if (slot & kConstantBit) return 0;
  const bool transposed = exec::options<exec::MatrixMoveOptions>(in).transposed;
  const int row = lane % 8;
  uint64_t undefined = 0;
  for (int column = 0; column < 8; ++column) {
    const int from = transposed ? 4 * column + row / 2 : 4 * row + column / 2;
    const int half = transposed ? row % 2 : column % 2;
    if (frame.undefined[slot / kUnitBytes + half] >> from & 1) {
      undefined |= uint64_t{3} << 2 * column;
    }
  }
  return undefined;
}

}  // namespace

uint64_t Values::stored(const Warp& warp, int lane) const {
  const Frame& frame = warp.frames[warp.fragment().frame];
  if (frame.undefined.empty()) return 0;
  const Instruction& in = warp.function->code[warp.pc];
  const Effects& effects = warp.function->effects[warp.pc];
  if (effects.flow == Flow::kStore && in.count > 0) {
    const Slot* values = warp.list(in);
    uint64_t undefined = 0;
    for (int k = 0; k < in.count; ++k) {
      if (values[k] & kConstantBit) continue;
      const uint32_t* words = &frame.undefined[values[k] / kUnitBytes];
      for (int half = 0; half < (in.bytes + 1) / 2; ++half) {
        const uint64_t bytes = in.bytes == 1 ? 1 : 3;
        if (words[half] >> lane & 1) undefined |= bytes << (k * in.bytes + 2 * half);
      }
    }
    return undefined;
  }
  if (effects.flow == Flow::kStoreMatrix) return stored_row(warp, frame, lane);
  if (effects.flow != Flow::kAtomic) return 0;
  // All operands but the address.
  uint32_t any = 0;
  for (int i = 0; i < effects.reads; ++i) {
    const Slot slot = warp.function->effect_slots[effects.first_read + i];
    if ((slot & ~kEffectSizeMask) == in.a) continue;
    for (uint32_t k = 0; k < (slot & kEffectSizeMask); ++k) {
      any |= frame.undefined[slot / kUnitBytes + k];
    }
  }
  return any >> lane & 1 ? ~uint64_t{0} : 0;
}

bool Values::may_store_undefined(const Warp& warp) const {
  const Frame& frame = warp.frames[warp.fragment().frame];
  if (frame.undefined.empty()) return false;
  const Instruction& in = warp.function->code[warp.pc];
  if (warp.function->effects[warp.pc].flow != Flow::kStore || in.count == 0) return true;
  uint32_t any = 0;
  for (int k = 0; k < in.count; ++k) {
    const Slot slot = warp.list(in)[k];
    if (slot & kConstantBit) continue;
    for (int half = 0; half < (in.bytes + 1) / 2; ++half) {
      any |= frame.undefined[slot / kUnitBytes + half];
    }
  }
  return any != 0;
}

void Values::loaded(Warp& warp, int lane, uint64_t undefined) {
  Frame& frame = warp.frames[warp.fragment().frame];
  if (frame.undefined.empty()) {
    frame.undefined.assign(warp.function->register_bytes / kUnitBytes + 8, 0);
  }
  const Instruction& in = warp.function->code[warp.pc];
  const Effects& effects = warp.function->effects[warp.pc];
  auto mark = [&](Slot slot, uint32_t half, int to_lane) {
    if (slot == kNoSlot) return;
    frame.undefined[slot / kUnitBytes + half] |= 1u << to_lane;
    state_of(warp).undefined_places |= place_of(slot / kUnitBytes + half);
  };
  if (effects.flow == Flow::kLoad) {
    for (int k = 0; k < in.count; ++k) {
      const Slot slot = warp.list(in)[k];
      for (uint32_t half = 0; half < (in.bytes + 1u) / 2; ++half) {
        if (undefined >> (k * in.bytes + 2 * half) & 3) mark(slot, half, lane);
      }
      // A narrow value fills the register.
      if (in.bytes < 4 && undefined >> k * in.bytes & 3) mark(slot, 1, lane);
    }
    return;
  }
  const bool transposed = effects.flow == Flow::kLoadMatrixTransposed;
  if (effects.flow == Flow::kLoadMatrix || transposed) {
    // The lane's address is row lane % 8 of matrix lane / 8 (PTX 9.7.14.5.15).
    const int matrix = lane / 8, row = lane % 8;
    const Slot slot = warp.list(in)[matrix];
    for (int column = 0; column < 8; ++column) {
      if (!(undefined >> 2 * column & 3)) continue;
      if (transposed) {
        mark(slot, row % 2, column * 4 + row / 2);
      } else {
        mark(slot, column % 2, row * 4 + column / 2);
      }
    }
    return;
  }
  for (int i = 0; i < effects.writes; ++i) {
    const Slot slot = warp.function->effect_slots[effects.first_write + i];
    for (uint32_t k = 0; k < (slot & kEffectSizeMask); ++k) mark(slot, k, lane);
  }
}

// PTX 9.7.15.5.1: accumulators lie as those of mma.
uint32_t Values::lanes_of_product(const exec::WgmmaShape& shape, int i, uint32_t half,
                                  uint32_t rows, const std::bitset<256>& columns) {
  const bool pairs = shape.d == exec::AccumulatorType::kF16;  // two columns in a register
  const int row_bit = pairs ? i & 1 : i >> 1 & 1;
  const int first_column = (pairs ? i / 2 : i / 4) * 8 + (pairs ? static_cast<int>(half) : i & 1);
  uint32_t lanes = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const bool row = rows >> (lane / 4 + 8 * row_bit) & 1;
    const bool column = columns[static_cast<size_t>(first_column + lane % 4 * 2)];
    lanes |= static_cast<uint32_t>(row || column) << lane;
  }
  return lanes;
}

void Values::completed(Warp& warp, const exec::WgmmaOperation& operation) {
  if (operation.undefined_rows.none() && operation.undefined_columns.none()) return;
  const exec::WgmmaShape shape = exec::shape_of(*operation.instruction);
  const size_t index = warp.id % exec::kWarpgroupWarps;
  const auto rows =
      static_cast<uint32_t>((operation.undefined_rows >> 16 * index).to_ullong() & 0xffff);
  const Slot* list = operation.function->lists.data() + operation.instruction->list;
  for (Frame& frame : warp.frames) {
    if (frame.registers.get() != operation.parts[index].frame) continue;
    if (frame.undefined.empty()) {
      frame.undefined.assign(operation.function->register_bytes / kUnitBytes + 8, 0);
    }
    for (int i = 0; i < shape.d_registers(); ++i) {
      for (uint32_t half = 0; half < 2 && list[i] != kNoSlot; ++half) {
        const uint32_t unit = list[i] / kUnitBytes + half;
        frame.undefined[unit] |=
            lanes_of_product(shape, i, half, rows, operation.undefined_columns);
        state_of(warp).undefined_places |= place_of(unit);
      }
    }
  }
}

bool Values::is_undefined(const Warp& warp, Slot slot, int lane) {
  const Frame& frame = warp.frames[warp.fragment().frame];
  if (frame.undefined.empty() || slot & kConstantBit) return false;
  const uint32_t* words = &frame.undefined[slot / kUnitBytes];
  return (words[0] | words[1]) >> lane & 1;
}

void Values::tidy(Warp& warp) {
  uint64_t places = 0;
  for (Frame& frame : warp.frames) {
    bool all_defined = true;
    for (size_t unit = 0; unit < frame.undefined.size(); ++unit) {
      if (!frame.undefined[unit]) continue;
      all_defined = false;
      places |= place_of(static_cast<uint32_t>(unit));
    }
    if (all_defined) frame.undefined.clear();
  }
  state_of(warp).undefined_places = places;
}

}  // namespace gpu_emulator::check
