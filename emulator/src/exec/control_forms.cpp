// bra, brx.idx, call, ret, exit, trap and relatives (PTX 9.7.12), and the system calls printf and
// assert use.

#include <cstring>

#include "decode.h"
#include "function_decoder.h"
#include "memory.h"
#include "report.h"
#include "scheduler.h"
#include "system_calls.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Operand;

Step jump(Warp& warp, uint32_t mask, const Instruction& in) {
  Fragment& fragment = warp.fragment();
  if (mask == fragment.mask) {
    fragment.pc = in.target;
  } else {
    diverge(warp, mask, in.target, warp.pc + 1, in.reconverge);
  }
  return Step::kJump;
}

Step run_branch(Warp& warp, const Instruction& in, uint32_t mask) { return jump(warp, mask, in); }

Step run_uniform_branch(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask != warp.fragment().mask && reports(warp, ReportKind::kUniformBranch)) {
    fail(
        warp, first_lane(mask), ReportKind::kUniformBranch,
        format("bra.uni is taken by the lanes 0x%08x of 0x%08x only.", mask, warp.fragment().mask));
  }
  return jump(warp, mask, in);
}

void decode_branch(Decoder& decoder) {
  Instruction& out = decoder.out;
  const Operand& label = decoder.operand(0);
  if (label.kind != Operand::Kind::kLabel) throw Unsupported("target is no label");
  out.target = static_cast<uint32_t>(decoder.function.ast().labels[label.index].instruction);
  out.run = decoder.take("uni") ? run_uniform_branch : run_branch;
  out.counter_class = InstructionClass::kControl;
}

// Lanes go to the label their index names. One target at a time leaves; the others come here again.
Step run_branch_table(Warp& warp, const Instruction& in, uint32_t mask) {
  const std::vector<uint32_t>& table = warp.function->branch_tables[in.imm];
  const uint32_t* index = warp.lanes<uint32_t>(in.a);
  const int leader = first_lane(mask);
  if (index[leader] >= table.size()) {
    fail(warp, leader, ReportKind::kInvalidOperand,
         format("brx.idx: index %u into a table of %zu labels.", index[leader], table.size()));
  }
  uint32_t same = 0;
  for_each_lane(mask, [&](int lane) {
    if (index[lane] == index[leader]) same |= 1u << lane;
  });
  Fragment& fragment = warp.fragment();
  if (same == fragment.mask) {
    fragment.pc = table[index[leader]];
  } else {
    const uint32_t next = mask == same ? warp.pc + 1 : warp.pc;
    diverge(warp, same, table[index[leader]], next, in.reconverge);
  }
  return Step::kJump;
}

void decode_branch_table(Decoder& decoder) {
  Instruction& out = decoder.out;
  decoder.take("uni");
  out.a = decoder.source(0, ptx::Type::kU32);
  const Operand& targets = decoder.operand(1);
  if (targets.kind != Operand::Kind::kBranchTargets) throw Unsupported("no branch targets");
  const ptx::Function& function = decoder.function.ast();
  std::vector<uint32_t> table;
  for (int label : function.branch_targets[targets.index]) {
    table.push_back(static_cast<uint32_t>(function.labels[label].instruction));
  }
  out.imm = static_cast<int64_t>(decoder.function.out().branch_tables.size());
  decoder.function.out().branch_tables.push_back(std::move(table));
  out.run = run_branch_table;
  out.counter_class = InstructionClass::kControl;
}

Step run_exit(Warp& warp, const Instruction&, uint32_t mask) {
  exit_lanes(warp, mask);
  return Step::kJump;
}

void decode_exit(Decoder& decoder) {
  decoder.out.run = run_exit;
  decoder.out.counter_class = InstructionClass::kControl;
}

// ------------------------------------------------------------------------------------------- calls

// Function::lists: slots of the local addresses of the caller's arguments, then of its results.
// imm: the callee, or a: its address.
const Function& callee_of(const Warp& warp, const Instruction& in, int lane) {
  const auto& functions = launch_of(warp).launch->program->functions;
  if (!options<CallOptions>(in).indirect) return functions[in.imm];
  const uint64_t target = warp.lanes<uint64_t>(in.a)[lane];
  if ((target & kWindowMask) != kFunctionWindow || (target & ~kWindowMask) >= functions.size()) {
    fail(warp, lane, ReportKind::kInvalidOperand,
         format("Call of 0x%llx, which is no function.", static_cast<unsigned long long>(target)));
  }
  return functions[target & ~kWindowMask];
}

// Lanes of mask that call the same function as its first lane.
uint32_t same_callee(const Warp& warp, const Instruction& in, uint32_t mask) {
  if (!options<CallOptions>(in).indirect) return mask;
  const uint64_t* target = warp.lanes<uint64_t>(in.a);
  uint32_t same = 0;
  for_each_lane(mask, [&](int lane) {
    if (target[lane] == target[first_lane(mask)]) same |= 1u << lane;
  });
  return same;
}

// Arguments and results are copied between frames without an instruction: for the observer they
// are written.
void show_copied(Warp& warp, uint32_t mask, uint64_t offset, uint32_t bytes) {
  Observer* observer = observer_of(warp);
  if (!observer) return;
  uint64_t address[kWarpSize];
  std::byte* host[kWarpSize];
  for_each_lane(mask, [&](int lane) {
    address[lane] = kLocalBase + offset;
    host[lane] = warp.local_memory(lane) + offset;
  });
  Access access;
  access.space = Space::kLocal;
  access.kind = AccessKind::kStore;
  access.bytes = bytes;
  access.mask = mask;
  access.address = address;
  access.host = host;
  observer->access(warp, access);
}

uint64_t local_offset(const Warp& warp, Slot slot) {
  return warp.lanes<uint64_t>(slot)[0] - kLocalBase;
}

void run_body_less(Warp& warp, const Instruction& in, const Function& callee, uint32_t mask) {
  const Slot* list = warp.list(in);
  std::vector<uint64_t> places;
  for (int i = 0; i < in.count; ++i) places.push_back(local_offset(warp, list[i]));
  run_system_call(warp, callee.name, places, mask);
  const size_t results = options<CallOptions>(in).results;
  const size_t given = places.size() - results;
  for (size_t i = 0; i < results && i < callee.returns.size(); ++i) {
    show_copied(warp, mask, places[given + i], callee.returns[i].bytes);
  }
}

void enter(Warp& warp, const Instruction& in, const Function& callee, uint32_t mask) {
  const Slot* list = warp.list(in);
  const size_t results = options<CallOptions>(in).results;
  const size_t given = in.count - results;
  if (given != callee.params.size() || results != callee.returns.size()) {
    fail(warp, first_lane(mask), ReportKind::kInvalidOperand,
         "Call of " + callee.name + " with another number of arguments or results.");
  }
  const uint32_t caller_base = warp.frames[warp.fragment().frame].local_base;
  const uint32_t base = caller_base + warp.function->local_bytes;
  std::vector<uint64_t> places;
  for (size_t i = 0; i < given; ++i) places.push_back(local_offset(warp, list[i]));
  call_function(warp, mask, callee, warp.pc);
  for (size_t i = 0; i < given; ++i) {
    for_each_lane(mask, [&](int lane) {
      std::byte* memory = warp.local_memory(lane);
      std::memcpy(memory + base + callee.params[i].offset, memory + places[i],
                  callee.params[i].bytes);
    });
    show_copied(warp, mask, base + callee.params[i].offset, callee.params[i].bytes);
  }
}

// Behind the call, when the lanes are back: copies the results from where the callee left them.
void copy_results(Warp& warp, const Instruction& call, const Function& callee, uint32_t mask) {
  const int count = options<CallOptions>(call).results;
  const Slot* results = warp.list(call) + (call.count - count);
  const uint32_t base = warp.frames[warp.fragment().frame].local_base + warp.function->local_bytes;
  for (int i = 0; i < count; ++i) {
    const uint64_t place = local_offset(warp, results[i]);
    for_each_lane(mask, [&](int lane) {
      std::byte* memory = warp.local_memory(lane);
      std::memcpy(memory + place, memory + base + callee.returns[i].offset,
                  callee.returns[i].bytes);
    });
    show_copied(warp, mask, place, callee.returns[i].bytes);
  }
}

// A call executes in several steps at the same pc: lanes enter the callee, those of one function at
// a time, and come back to it with their bit of `e`, the frame's "returned" mask, set; when all are
// back they take their results.
Step run_call_or_return(Warp& warp, const Instruction& in, uint32_t mask) {
  uint32_t* returned = warp.lanes<uint32_t>(in.e);
  uint32_t left = 0;
  for_each_lane(mask, [&](int lane) {
    if (!returned[lane]) left |= 1u << lane;
  });
  while (left) {
    const uint32_t same = same_callee(warp, in, left);
    const Function& callee = callee_of(warp, in, first_lane(same));
    for_each_lane(same, [&](int lane) { returned[lane] = 1; });
    if (callee.has_body) {
      enter(warp, in, callee, same);
      return Step::kJump;
    }
    run_body_less(warp, in, callee, same);
    left &= ~same;
  }
  for_each_lane(mask, [&](int lane) { returned[lane] = 0; });
  while (mask) {
    const uint32_t same = same_callee(warp, in, mask);
    const Function& callee = callee_of(warp, in, first_lane(same));
    if (callee.has_body) copy_results(warp, in, callee, same);
    mask &= ~same;
  }
  return Step::kNext;
}

// call{.uni} (results), function, (arguments){, prototype};
void decode_call(Decoder& decoder) {
  Instruction& out = decoder.out;
  decoder.take("uni");
  CallOptions& how = make_options<CallOptions>(out);
  std::vector<Operand> results, arguments;
  size_t next = 0;
  if (decoder.operand(0).kind == Operand::Kind::kVector) {
    results = decoder.operand(0).elements;
    next = 1;
  }
  const Operand& callee = decoder.operand(next++);
  if (callee.kind == Operand::Kind::kFunction) {
    out.imm = callee.index;
  } else {
    out.a = decoder.source(callee, ptx::Type::kU64);
    how.indirect = true;
  }
  if (next < decoder.operands() && decoder.operand(next).kind == Operand::Kind::kVector) {
    arguments = decoder.operand(next).elements;
  }
  std::vector<Slot> slots;
  auto append = [&](const Operand& variable) {
    if (variable.kind != Operand::Kind::kVariable) throw Unsupported("argument in a register");
    slots.push_back(decoder.function.variable_address(variable, 8));
  };
  for (const Operand& argument : arguments) append(argument);
  for (const Operand& result : results) append(result);
  decoder.list(slots);
  how.results = static_cast<uint8_t>(results.size());
  out.e = decoder.function.special("%returned", 4);
  out.run = run_call_or_return;
  out.counter_class = InstructionClass::kControl;
}

Step run_return(Warp& warp, const Instruction&, uint32_t mask) {
  return_lanes(warp, mask);
  return Step::kJump;
}

void decode_return(Decoder& decoder) {
  decoder.take("uni");
  decoder.out.run = run_return;
  decoder.out.counter_class = InstructionClass::kControl;
}

// ------------------------------------------------------------------------------------- trap, hints

Step run_trap(Warp& warp, const Instruction&, uint32_t mask) {
  fail(warp, first_lane(mask), ReportKind::kTrap, "The kernel executed a trap.");
}

void decode_trap(Decoder& decoder) { decoder.out.run = run_trap; }

Step run_nanosleep(Warp&, const Instruction&, uint32_t) { return Step::kYield; }

void decode_nanosleep(Decoder& decoder) {
  decoder.take_type();
  decoder.out.run = run_nanosleep;
}

Step run_nothing(Warp&, const Instruction&, uint32_t) { return Step::kNext; }

void decode_nothing(Decoder& decoder) {
  decoder.take_any({"wait", "launch_dependents"});  // griddepcontrol
  decoder.out.run = run_nothing;
}

constexpr Form kForms[] = {
    {"bra", decode_branch},      {"brx.idx", decode_branch_table},
    {"exit", decode_exit},       {"ret", decode_return},
    {"call", decode_call},       {"trap", decode_trap},
    {"brkpt", decode_trap},      {"nanosleep", decode_nanosleep},
    {"pmevent", decode_nothing}, {"griddepcontrol", decode_nothing},
};

}  // namespace

std::span<const Form> control_forms() { return kForms; }

}  // namespace gpu_emulator::exec
