#include "assignment.h"

#include <algorithm>

#include "values.h"

namespace gpu_emulator::check {

using exec::Effects;
using exec::Flow;
using exec::Function;
using exec::Instruction;
using exec::kConstantBit;
using exec::kEffectSizeMask;
using exec::kNoPc;
using exec::kNoSlot;
using exec::Slot;

namespace {

using Bits = std::vector<uint64_t>;

class Assignment {
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

}  // namespace

std::vector<uint32_t> unassigned_words(const Function& function) {
  return Assignment(function).unassigned();
}

}  // namespace gpu_emulator::check
