// One instruction's flow of undefined values: Values::follow.

#include "../exec/cta.h"
#include "../exec/report.h"
#include "../exec/shuffle.h"
#include "../exec/wgmma.h"
#include "state.h"
#include "values.h"

namespace gpu_emulator::check {

using exec::Effects;
using exec::Flow;
using exec::for_each_lane;
using exec::Frame;
using exec::Instruction;
using exec::kConstantBit;
using exec::kEffectSizeMask;
using exec::kNoSlot;
using exec::kWarpSize;
using exec::ReportKind;
using exec::Slot;
using exec::Warp;

namespace {

class Propagation {
 public:
  Propagation(Warp& warp, Frame& frame, const Instruction& in, uint32_t mask)
      : warp_(warp),
        undefined_(frame.undefined.data()),
        places_(state_of(warp).undefined_places),
        in_(in),
        mask_(mask),
        effects_(warp.function->effects[warp.pc]),
        reads_(warp.function->effect_slots.data() + effects_.first_read),
        writes_(warp.function->effect_slots.data() + effects_.first_write) {}

  uint32_t any_read() const {
    uint32_t any = 0;
    for (int i = 0; i < effects_.reads; ++i) any |= whole(reads_[i]);
    return any & mask_;
  }

  void define_results() {
    for (int i = 0; i < effects_.writes; ++i) set_all(writes_[i], 0);
  }

  // Undefined lanes of the address, where one decides.
  uint32_t undefined_address(uint32_t any) const {
    switch (effects_.flow) {
      case Flow::kLoad:
      case Flow::kLoadMatrix:
      case Flow::kLoadMatrixTransposed:
      case Flow::kAddress:
        return any;
      case Flow::kStore:
      case Flow::kStoreMatrix:
      case Flow::kAtomic:
        return register_lanes(in_.a) & mask_;
      case Flow::kWarpgroupMatrix:
        return (register_lanes(in_.a) | register_lanes(in_.b) | register_lanes(in_.c)) & mask_;
      default:
        return 0;
    }
  }

  void apply(uint32_t any) {
    switch (effects_.flow) {
      case Flow::kUnion:
        set_results(any);
        break;
      case Flow::kMove:
        move();
        break;
      case Flow::kSelect:
        select();
        break;
      case Flow::kLogic:
        logic(any);
        break;
      case Flow::kShift:
        shift(any);
        break;
      case Flow::kHalves:
        halves();
        break;
      case Flow::kPackHalves:
        pack_halves(any);
        break;
      case Flow::kShuffle:
        shuffle();
        break;
      case Flow::kLanes:
        set_results(mask_);
        break;
      case Flow::kMatrix:
        matrix();
        break;
      case Flow::kWarpgroupMatrix:
        warpgroup_matrix();
        break;
      default:
        define_results();
        break;
    }
  }

 private:
  static bool is_register(Slot slot) { return slot != kNoSlot && !(slot & kConstantBit); }
  uint32_t word(Slot slot, uint32_t k) const {
    return is_register(slot) ? undefined_[slot / kUnitBytes + k] : 0;
  }
  uint32_t whole(Slot slot) const {  // of a slot with its size
    uint32_t any = 0;
    if (!is_register(slot)) return 0;
    for (uint32_t k = 0; k < (slot & kEffectSizeMask); ++k) any |= word(slot, k);
    return any;
  }
  // Slots of an instruction have no size: the effects know it.
  uint32_t size_of(Slot slot) const {
    for (int i = 0; i < effects_.reads; ++i) {
      if (is_register(reads_[i]) && (reads_[i] & ~kEffectSizeMask) == slot) {
        return reads_[i] & kEffectSizeMask;
      }
    }
    return 0;
  }
  uint32_t register_lanes(Slot slot) const {
    return is_register(slot) ? whole(slot | size_of(slot)) : 0;
  }
  void set(Slot slot, uint32_t k, uint32_t lanes) {
    const uint32_t unit = slot / kUnitBytes + k;
    undefined_[unit] = (undefined_[unit] & ~mask_) | (lanes & mask_);
    if (undefined_[unit]) places_ |= place_of(unit);
  }
  void set_all(Slot slot, uint32_t lanes) {
    if (!is_register(slot)) return;
    for (uint32_t k = 0; k < (slot & kEffectSizeMask); ++k) set(slot, k, lanes);
  }
  void set_results(uint32_t lanes) {
    for (int i = 0; i < effects_.writes; ++i) set_all(writes_[i], lanes);
  }

  void move() {
    const int data_reads = effects_.reads - (in_.guard != kNoSlot);
    if (effects_.bits == 0 || data_reads <= 0 || effects_.writes == 0) {
      set_results(any_read());
      return;
    }
    const int halves = effects_.bits / 16;
    const int each_read = halves / data_reads, each_write = halves / effects_.writes;
    if (each_read == 0 || each_write == 0) {
      set_results(any_read());
      return;
    }
    uint32_t value[8] = {};
    for (int h = 0; h < halves && h < 8; ++h) {
      const Slot slot = reads_[h / each_read];
      const auto k = static_cast<uint32_t>(h % each_read);
      if (is_register(slot) && k < (slot & kEffectSizeMask)) value[h] = word(slot, k);
    }
    define_results();
    for (int h = 0; h < halves && h < 8; ++h) {
      const Slot slot = writes_[h / each_write];
      const auto k = static_cast<uint32_t>(h % each_write);
      if (is_register(slot) && k < (slot & kEffectSizeMask)) set(slot, k, value[h]);
    }
  }

  void select() {
    const uint32_t by = warp_.predicate(in_.c), unknown = word(in_.c, 0);
    const uint32_t size = effects_.writes ? writes_[0] & kEffectSizeMask : 0;
    for (uint32_t k = 0; k < size; ++k) {
      set(writes_[0], k, unknown | (by & word(in_.a, k)) | (~by & word(in_.b, k)));
    }
  }

  // A defined 0 decides an `and`, a defined 1 an `or`.
  void logic(uint32_t any) {
    const bool is_and = effects_.bits == 1;
    const uint32_t size = effects_.writes ? writes_[0] & kEffectSizeMask : 0;
    if (size > 2) {
      set_results(any);
      return;
    }
    const uint32_t halves = size == 1 ? 1 : 2;
    for (uint32_t k = 0; k < halves; ++k) {
      const uint32_t a = word(in_.a, k), b = word(in_.b, k);
      const uint32_t open_a = open_lanes(in_.a, k, size == 1, is_and);
      const uint32_t open_b = open_lanes(in_.b, k, size == 1, is_and);
      set(writes_[0], k, (a & b) | (a & open_b) | (b & open_a));
    }
  }

  // Lanes where some bit of the half does not decide.
  uint32_t open_lanes(Slot slot, uint32_t half, bool is_predicate, bool is_and) const {
    if (is_predicate) return is_and ? warp_.predicate(slot) : ~warp_.predicate(slot);
    const uint32_t* values = warp_.lanes<uint32_t>(slot);
    uint32_t open = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const uint32_t value = values[lane] >> 16 * half & 0xffff;
      open |= static_cast<uint32_t>(is_and ? value != 0 : value != 0xffff) << lane;
    }
    return open;
  }

  void shift(uint32_t any) {
    const bool constant = in_.b != kNoSlot && in_.b & kConstantBit;
    const bool is_32_bit = effects_.writes && (writes_[0] & kEffectSizeMask) == 2;
    if (!constant || !is_32_bit || warp_.lanes<uint32_t>(in_.b)[0] != 16) {
      set_results(any);
      return;
    }
    const bool left = effects_.bits == 1;
    const uint32_t moved = word(in_.a, left ? 0 : 1);
    set(writes_[0], left ? 1 : 0, moved);
    set(writes_[0], left ? 0 : 1, left ? 0 : moved);
  }

  void halves() {
    const uint32_t size = effects_.writes ? writes_[0] & kEffectSizeMask : 0;
    for (uint32_t k = 0; k < size; ++k) {
      uint32_t lanes = 0;
      for (int i = 0; i < effects_.reads; ++i) {
        if (is_register(reads_[i]) && (reads_[i] & kEffectSizeMask) > k) {
          lanes |= word(reads_[i], k);
        }
      }
      set(writes_[0], k, lanes);
    }
  }

  void pack_halves(uint32_t any) {
    const bool pair = in_.b != kNoSlot && effects_.writes && (writes_[0] & kEffectSizeMask) == 2;
    if (!pair) {
      set_results(any);
      return;
    }
    const uint32_t low = register_lanes(in_.b), high = register_lanes(in_.a);
    set(writes_[0], 0, low);
    set(writes_[0], 1, high);
  }

  void shuffle();
  void matrix();
  void warpgroup_matrix();

  Warp& warp_;
  uint32_t* undefined_;
  uint64_t& places_;
  const Instruction& in_;
  uint32_t mask_;
  const Effects& effects_;
  const Slot* reads_;
  const Slot* writes_;
};

// PTX 9.7.9.6. The predicate, in the list, depends on the lane numbers only.
void Propagation::shuffle() {
  const uint32_t* b = warp_.lanes<uint32_t>(in_.b);
  const uint32_t* c = warp_.lanes<uint32_t>(in_.c);
  const uint32_t by = register_lanes(in_.b) | register_lanes(in_.c);
  const uint32_t from[2] = {word(in_.a, 0), word(in_.a, 1)};
  define_results();
  const exec::ShuffleMode mode = exec::options<exec::ShuffleOptions>(in_).mode;
  for (uint32_t k = 0; k < 2 && is_register(in_.d); ++k) {
    uint32_t lanes = by;
    for_each_lane(mask_, [&](int lane) {
      const int source = exec::shuffle_source(mode, lane, b[lane], c[lane]).lane;
      lanes |= (from[k] >> source & 1) << lane;
    });
    set(in_.d, k, lanes);
  }
}

// PTX 9.7.14.5: register i of A holds elements of row lane / 4 + 8 * (i & 1), those of B lie in
// column lane / 4, those of C and D in the rows of A and columns lane % 4 * 2 and the next.
void Propagation::matrix() {
  const Slot* list = warp_.list(in_);
  const int b_registers = in_.count >= 14 ? 2 : 1, a_registers = 2 * b_registers;
  auto lanes_of = [&](Slot slot) { return word(slot, 0) | word(slot, 1); };
  uint32_t rows = 0, columns = 0;
  for (int i = 0; i < a_registers; ++i) {
    for_each_lane(lanes_of(list[4 + i]), [&](int lane) { rows |= 1u << (lane / 4 + 8 * (i & 1)); });
  }
  for (int i = 0; i < b_registers; ++i) {
    for_each_lane(lanes_of(list[4 + a_registers + i]),
                  [&](int lane) { columns |= 1u << lane / 4; });
  }
  uint32_t results[4];
  for (int i = 0; i < 4; ++i) {
    results[i] = lanes_of(list[4 + a_registers + b_registers + i]);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const bool row = rows >> (lane / 4 + 8 * (i / 2)) & 1;
      const bool column = columns >> (lane % 4 * 2 + (i & 1)) & 1;
      results[i] |= static_cast<uint32_t>(row || column) << lane;
    }
  }
  for (int i = 0; i < 4; ++i) {
    set(list[i], 0, results[i]);
    set(list[i], 1, results[i]);
  }
}

// PTX 9.7.15.5: A in registers lies as that of mma, four registers of which odd ones hold the rows
// from 8 on.
void Propagation::warpgroup_matrix() {
  const exec::WgmmaShape shape = exec::shape_of(in_);
  const Slot* list = warp_.list(in_);
  const int accumulators = shape.d_registers();
  uint32_t rows = 0;
  for (int i = 0; i < exec::kARegisters && shape.a_in_registers; ++i) {
    const Slot slot = list[accumulators + i];
    for_each_lane(word(slot, 0) | word(slot, 1),
                  [&](int lane) { rows |= 1u << (lane / 4 + 8 * (i & 1)); });
  }
  const bool accumulates = warp_.predicate(in_.c) != 0;
  for (int i = 0; i < accumulators; ++i) {
    if (list[i] == kNoSlot) continue;
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t lanes = Values::lanes_of_product(shape, i, half, rows, {});
      set(list[i], half, lanes | (accumulates ? word(list[i], half) : 0));
    }
  }
}

std::string origin_of(const Warp& warp) {
  const std::string& origin = static_cast<const WarpState*>(warp.observed)->origin;
  if (origin.empty()) return " It comes from a register that was not written before.";
  return " The first undefined value that this warp read was " + origin;
}

}  // namespace

void Values::follow(Warp& warp, Frame& frame, const Instruction& in, uint32_t mask) {
  Propagation propagation(warp, frame, in, mask);
  if (in.guard != kNoSlot) {
    const uint32_t undefined = frame.undefined[in.guard / kUnitBytes] & warp.fragment().mask;
    if (undefined && exec::reports(warp, ReportKind::kUndefinedGuard)) {
      exec::fail(
          warp, exec::first_lane(undefined), ReportKind::kUndefinedGuard,
          "An undefined value decides whether this instruction is executed." + origin_of(warp));
    }
  }
  if (!mask) return;
  const uint32_t any = propagation.any_read();
  if (!any) {
    propagation.define_results();
    return;
  }
  const uint32_t lanes = propagation.undefined_address(any);
  if (lanes && exec::reports(warp, ReportKind::kUndefinedAddress)) {
    exec::fail(warp, exec::first_lane(lanes), ReportKind::kUndefinedAddress,
               "An undefined value is used as an address or an operand that must be known." +
                   origin_of(warp));
  }
  propagation.apply(any);
}

}  // namespace gpu_emulator::check
