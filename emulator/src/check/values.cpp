#include "values.h"

#include <algorithm>

#include "../exec/cta.h"
#include "../exec/report.h"
#include "../exec/shuffle.h"
#include "state.h"

namespace gpu_emulator::check {

using exec::Effects;
using exec::Flow;
using exec::for_each_lane;
using exec::Frame;
using exec::Function;
using exec::Instruction;
using exec::kConstantBit;
using exec::kEffectSizeMask;
using exec::kNoPc;
using exec::kNoSlot;
using exec::kWarpSize;
using exec::Slot;
using exec::Warp;

namespace {

constexpr uint32_t kUnitBytes = 64;

// ------------------------------------------------------- registers that may be read before a write

using Bits = std::vector<uint64_t>;

class Assignment {  // definite assignment: a forward analysis over basic blocks
 public:
  explicit Assignment(const Function& function) : function_(function) {
    words_ = (function.register_bytes / kUnitBytes + 63) / 64;
    find_blocks();
  }

  std::vector<uint32_t> unassigned() {
    if (is_target_[0]) return {};
    assigned_.assign(blocks_.size(), Bits());
    assigned_[0] = Bits(words_);
    std::vector<size_t> work = {0};
    while (!work.empty()) {
      const size_t block = work.back();
      work.pop_back();
      Bits out = assigned_[block];
      run(block, out, nullptr);
      for (size_t next : successors(block)) {
        if (merge(assigned_[next], out)) work.push_back(next);
      }
    }
    Bits found(words_);
    for (size_t block = 0; block < blocks_.size(); ++block) {
      if (assigned_[block].empty()) continue;  // not reachable
      Bits state = assigned_[block];
      run(block, state, &found);
    }
    std::vector<uint32_t> list;
    for (size_t i = 0; i < found.size() * 64; ++i) {
      if (found[i / 64] >> i % 64 & 1) list.push_back(static_cast<uint32_t>(i));
    }
    return list;
  }

 private:
  void find_blocks() {
    const auto& code = function_.code;
    is_target_.assign(code.size() + 1, false);
    std::vector<bool> leader(code.size() + 1, false);
    leader[0] = true;
    auto target = [&](uint32_t pc) {
      if (pc <= code.size()) is_target_[pc] = leader[pc] = true;
    };
    for (size_t pc = 0; pc < code.size(); ++pc) {
      if (code[pc].target != kNoPc) target(code[pc].target);
      if (code[pc].target != kNoPc || function_.effects[pc].ends_flow) leader[pc + 1] = true;
    }
    for (const auto& table : function_.branch_tables) {
      for (uint32_t pc : table) target(pc);
    }
    block_of_.assign(code.size() + 1, 0);
    for (size_t pc = 0; pc < code.size(); ++pc) {
      if (leader[pc]) blocks_.push_back(pc);
      block_of_[pc] = blocks_.size() - 1;
    }
  }

  size_t end_of(size_t block) const {
    return block + 1 < blocks_.size() ? blocks_[block + 1] : function_.code.size();
  }

  std::vector<size_t> successors(size_t block) const {
    std::vector<size_t> list;
    const size_t last = end_of(block) - 1;
    auto add = [&](size_t pc) {
      if (pc < function_.code.size()) list.push_back(block_of_[pc]);
    };
    const Instruction& in = function_.code[last];
    if (in.target != kNoPc) add(in.target);
    if (!function_.effects[last].ends_flow) add(last + 1);
    if (function_.effects[last].ends_flow && in.target == kNoPc) {
      // brx, ret and exit alike: tables are few, so any of their targets.
      for (const auto& table : function_.branch_tables) {
        for (uint32_t pc : table) add(pc);
      }
    }
    return list;
  }

  void run(size_t block, Bits& state, Bits* found) const {
    for (size_t pc = blocks_[block]; pc < end_of(block); ++pc) {
      const Effects& effects = function_.effects[pc];
      const Slot* slots = function_.effect_slots.data();
      auto for_units = [&](Slot slot, auto&& f) {
        if (slot == kNoSlot || slot & kConstantBit) return;
        const uint32_t first = slot / kUnitBytes;
        for (uint32_t k = 0; k < (slot & kEffectSizeMask); ++k) f(first + k);
      };
      if (found && effects.flow != Flow::kNone) {
        for (int i = 0; i < effects.reads; ++i) {
          for_units(slots[effects.first_read + i], [&](uint32_t unit) {
            if (state[unit / 64] >> unit % 64 & 1 || always_defined(unit)) return;
            (*found)[unit / 64] |= uint64_t{1} << unit % 64;
          });
        }
      }
      if (function_.code[pc].guard != kNoSlot) continue;
      for (int i = 0; i < effects.writes; ++i) {
        for_units(slots[effects.first_write + i],
                  [&](uint32_t unit) { state[unit / 64] |= uint64_t{1} << unit % 64; });
      }
    }
  }

  bool always_defined(uint32_t unit) const {
    return std::any_of(function_.frame_values.begin(), function_.frame_values.end(),
                       [&](const exec::FrameValue& value) {
                         const uint32_t first = value.slot / kUnitBytes;
                         return unit >= first && unit < first + (value.wide ? 4 : 2);
                       });
  }

  static bool merge(Bits& into, const Bits& from) {
    if (into.empty()) {
      into = from;
      return true;
    }
    bool changed = false;
    for (size_t i = 0; i < into.size(); ++i) {
      changed |= (into[i] & from[i]) != into[i];
      into[i] &= from[i];
    }
    return changed;
  }

  const Function& function_;
  size_t words_;
  std::vector<bool> is_target_;
  std::vector<size_t> blocks_, block_of_;
  std::vector<Bits> assigned_;  // at the beginning of each block
};

// ---------------------------------------------------------------------------- one instruction's
// flow

class Propagation {
 public:
  Propagation(Warp& warp, Frame& frame, const Instruction& in, uint32_t mask)
      : warp_(warp),
        undefined_(frame.undefined.data()),
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
      case Flow::kAtomic:
        return register_lanes(in_.a) & mask_;
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
    uint32_t& target = undefined_[slot / kUnitBytes + k];
    target = (target & ~mask_) | (lanes & mask_);
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

  Warp& warp_;
  uint32_t* undefined_;
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
  for (uint32_t k = 0; k < 2 && is_register(in_.d); ++k) {
    uint32_t lanes = by;
    for_each_lane(mask_, [&](int lane) {
      const int source = exec::shuffle_source(in_.option[0], lane, b[lane], c[lane]).lane;
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

std::string origin_of(const Warp& warp) {
  const std::string& origin = static_cast<const WarpState*>(warp.observed)->origin;
  if (origin.empty()) return " It comes from a register that was not written before.";
  return " The first undefined value that this warp read was " + origin;
}

}  // namespace

Values::Values(const exec::Program& program) {
  for (const Function& function : program.functions) {
    if (function.has_body && !function.code.empty()) {
      unassigned_[&function] = find_unassigned(function);
    }
  }
}

Values::Unassigned Values::find_unassigned(const Function& function) {
  return {Assignment(function).unassigned()};
}

void Values::begin_function(Warp& warp) {
  const auto found = unassigned_.find(warp.function);
  Frame& frame = warp.frames[warp.fragment().frame];
  if (found == unassigned_.end() || found->second.words.empty() || !frame.undefined.empty()) {
    return;
  }
  frame.undefined.assign(warp.function->register_bytes / kUnitBytes + 8, 0);
  for (uint32_t word : found->second.words) frame.undefined[word] = exec::kAllLanes;
}

void Values::follow(Warp& warp, Frame& frame, const Instruction& in, uint32_t mask) {
  Propagation propagation(warp, frame, in, mask);
  if (in.guard != kNoSlot) {
    const uint32_t undefined = frame.undefined[in.guard / kUnitBytes] & warp.fragment().mask;
    if (undefined) {
      exec::fail(
          warp, exec::first_lane(undefined), exec::ReportKind::kUninitialised,
          "An undefined value decides whether this instruction is executed." + origin_of(warp));
    }
  }
  if (!mask) return;
  const uint32_t any = propagation.any_read();
  if (!any) {
    propagation.define_results();
    return;
  }
  if (const uint32_t lanes = propagation.undefined_address(any)) {
    exec::fail(warp, exec::first_lane(lanes), exec::ReportKind::kUninitialised,
               "An undefined value is used as an address or an operand that must be known." +
                   origin_of(warp));
  }
  propagation.apply(any);
}

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

void Values::loaded(Warp& warp, int lane, uint64_t undefined) {
  Frame& frame = warp.frames[warp.fragment().frame];
  if (frame.undefined.empty()) {
    frame.undefined.assign(warp.function->register_bytes / kUnitBytes + 8, 0);
  }
  const Instruction& in = warp.function->code[warp.pc];
  const Effects& effects = warp.function->effects[warp.pc];
  auto mark = [&](Slot slot, uint32_t half, int to_lane) {
    if (slot != kNoSlot) frame.undefined[slot / kUnitBytes + half] |= 1u << to_lane;
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

void Values::tidy(Warp& warp) {
  for (Frame& frame : warp.frames) {
    const bool all_defined = std::all_of(frame.undefined.begin(), frame.undefined.end(),
                                         [](uint32_t lanes) { return lanes == 0; });
    if (all_defined) frame.undefined.clear();
  }
}

}  // namespace gpu_emulator::check
