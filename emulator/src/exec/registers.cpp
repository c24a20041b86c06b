// Which slot of the register file a virtual register has.

#include <algorithm>
#include <queue>
#include <unordered_map>

#include "../ptx/cfg.h"
#include "function_decoder.h"

namespace gpu_emulator::exec {
namespace {

using Bits = std::vector<uint64_t>;

bool test(const Bits& bits, int i) { return bits[i / 64] >> (i % 64) & 1; }
void set(Bits& bits, int i) { bits[i / 64] |= uint64_t{1} << (i % 64); }
void reset(Bits& bits, int i) { bits[i / 64] &= ~(uint64_t{1} << (i % 64)); }

// Registers that an instruction reads and writes.
struct Uses {
  std::vector<int> reads, writes;
  bool may_not_write = false;    // guarded: the old value may live on
  bool holds_registers = false;  // wgmma: until a later wait
};

std::vector<Uses> collect_uses(const ptx::Function& ast, const Function& decoded,
                               const RegisterAssignment& separate) {
  std::unordered_map<Slot, int> register_of;
  for (size_t i = 0; i < separate.slots.size(); ++i) {
    register_of[separate.slots[i]] = static_cast<int>(i);
  }
  auto append = [&](uint32_t first, uint16_t count, std::vector<int>& out) {
    for (uint32_t i = first; i < first + count; ++i) {
      const Slot slot = decoded.effect_slots[i];
      if (slot == kNoSlot || slot & kConstantBit) continue;
      const auto found = register_of.find(slot & ~kEffectSizeMask);
      if (found != register_of.end()) out.push_back(found->second);
    }
  };
  std::vector<Uses> uses(ast.body.size());
  for (size_t pc = 0; pc < ast.body.size(); ++pc) {
    const Effects& effects = decoded.effects[pc];
    append(effects.first_read, effects.reads, uses[pc].reads);
    append(effects.first_write, effects.writes, uses[pc].writes);
    uses[pc].may_not_write = ast.body[pc].guard >= 0;
    uses[pc].holds_registers = ast.body[pc].opcode == "wgmma";
  }
  return uses;
}

struct Liveness {  // by block
  std::vector<Bits> in, out;
};

Liveness find_liveness(const ptx::ControlFlowGraph& cfg, const std::vector<Uses>& uses,
                       size_t registers) {
  const size_t blocks = cfg.successors.size(), words = registers / 64 + 1;
  std::vector<Bits> use(blocks, Bits(words)), define(blocks, Bits(words));
  for (size_t b = 0; b < blocks; ++b) {
    for (int pc = cfg.begin[b]; pc < cfg.begin[b + 1]; ++pc) {
      for (int r : uses[pc].reads) {
        if (!test(define[b], r)) set(use[b], r);
      }
      if (uses[pc].may_not_write) continue;
      for (int r : uses[pc].writes) set(define[b], r);
    }
  }
  Liveness live = {use, std::vector<Bits>(blocks, Bits(words))};
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks; b-- > 0;) {
      for (int next : cfg.successors[b]) {
        for (size_t w = 0; w < words; ++w) live.out[b][w] |= live.in[next][w];
      }
      for (size_t w = 0; w < words; ++w) {
        const uint64_t in = use[b][w] | (live.out[b][w] & ~define[b][w]);
        changed |= in != live.in[b][w];
        live.in[b][w] = in;
      }
    }
  }
  return live;
}

// From the first to the last place where the register is alive. An instruction is two places:
// 2 pc, where it reads, and 2 pc + 1, where it writes.
struct Interval {
  int reg = 0;
  int begin = -1, end = -2;  // nowhere

  void extend(int place) {
    begin = end < begin ? place : std::min(begin, place);
    end = std::max(end, place);
  }
};

std::vector<Interval> find_intervals(const ptx::ControlFlowGraph& cfg,
                                     const std::vector<Uses>& uses, const Liveness& live,
                                     size_t registers) {
  std::vector<Interval> intervals(registers);
  const int last_place = 2 * static_cast<int>(uses.size());
  for (size_t i = 0; i < registers; ++i) intervals[i].reg = static_cast<int>(i);
  for (size_t b = 0; b < cfg.successors.size(); ++b) {
    for (size_t i = 0; i < registers; ++i) {
      if (test(live.in[b], static_cast<int>(i))) intervals[i].extend(2 * cfg.begin[b] - 1);
      if (test(live.out[b], static_cast<int>(i))) intervals[i].extend(2 * cfg.begin[b + 1]);
    }
  }
  for (size_t pc = 0; pc < uses.size(); ++pc) {
    const int place = 2 * static_cast<int>(pc);
    // Only an instruction with one result may write it over one of its operands: handlers write
    // several results one after the other.
    const int write_place = uses[pc].writes.size() > 1 ? place : place + 1;
    for (int r : uses[pc].reads) intervals[r].extend(place);
    for (int r : uses[pc].writes) intervals[r].extend(write_place);
    if (!uses[pc].holds_registers) continue;
    for (const auto* list : {&uses[pc].reads, &uses[pc].writes}) {
      for (int r : *list) {
        intervals[r].extend(-1);
        intervals[r].extend(last_place);
      }
    }
  }
  return intervals;
}

int weight_of(ptx::Type type) {  // 32-bit registers of the GPU
  return type == ptx::Type::kPred ? 0 : (size_of(type) + 3) / 4;
}

int most_alive(const ptx::Function& ast, const ptx::ControlFlowGraph& cfg,
               const std::vector<Uses>& uses, const Liveness& live) {
  int most = 0;
  for (size_t b = 0; b < cfg.successors.size(); ++b) {
    Bits alive = live.out[b];
    int count = 0;
    for (size_t i = 0; i < ast.registers.size(); ++i) {
      if (test(alive, static_cast<int>(i))) count += weight_of(ast.registers[i].type);
    }
    most = std::max(most, count);
    for (int pc = cfg.begin[b + 1] - 1; pc >= cfg.begin[b]; --pc) {
      for (int r : uses[pc].writes) {
        if (uses[pc].may_not_write || !test(alive, r)) continue;
        reset(alive, r);
        count -= weight_of(ast.registers[r].type);
      }
      for (int r : uses[pc].reads) {
        if (test(alive, r)) continue;
        set(alive, r);
        count += weight_of(ast.registers[r].type);
      }
      most = std::max(most, count);
    }
  }
  return most;
}

// Linear scan: slots of one size, given back where an interval ends.
void assign_slots(const ptx::Function& ast, std::vector<Interval> intervals,
                  RegisterAssignment& result) {
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  using Ending = std::pair<int, int>;  // end, register
  std::priority_queue<Ending, std::vector<Ending>, std::greater<>> active;
  std::unordered_map<uint32_t, std::vector<Slot>> free_slots;  // by size
  auto bytes_of = [&](int reg) { return register_slot_bytes(ast.registers[reg].type); };
  for (const Interval& interval : intervals) {
    while (!active.empty() && active.top().first < interval.begin) {
      const int ended = active.top().second;
      free_slots[bytes_of(ended)].push_back(result.slots[ended]);
      active.pop();
    }
    const uint32_t bytes = bytes_of(interval.reg);
    auto& available = free_slots[bytes];
    if (available.empty()) {
      available.push_back(result.bytes);
      result.bytes += bytes;
    }
    result.slots[interval.reg] = available.back();
    available.pop_back();
    active.push({interval.end, interval.reg});
  }
}

}  // namespace

uint32_t register_slot_bytes(ptx::Type type) {
  constexpr uint32_t kPredicateBytes = 64;
  const uint32_t bytes = ptx::type_bytes(type);
  return bytes == 0 ? kPredicateBytes : std::max<uint32_t>(bytes, 4) * kWarpSize;
}

RegisterAssignment separate_registers(const ptx::Function& function) {
  RegisterAssignment result;
  for (const ptx::Register& reg : function.registers) {
    result.slots.push_back(result.bytes);
    result.bytes += register_slot_bytes(reg.type);
  }
  return result;
}

RegisterAssignment share_registers(const ptx::Function& function, const Function& decoded,
                                   const RegisterAssignment& separate) {
  RegisterAssignment result;
  result.slots.resize(function.registers.size());
  if (function.registers.empty()) return result;
  const ptx::ControlFlowGraph cfg = ptx::build_cfg(function);
  const std::vector<Uses> uses = collect_uses(function, decoded, separate);
  const Liveness live = find_liveness(cfg, uses, function.registers.size());
  assign_slots(function, find_intervals(cfg, uses, live, function.registers.size()), result);
  result.max_live = most_alive(function, cfg, uses, live);
  return result;
}

}  // namespace gpu_emulator::exec
