// Fragments of a warp: divergence, reconvergence, calls, exits, collectives.

#include <utility>

#include "hopper_state.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

using State = Fragment::State;

int add_fragment(Warp& warp, const Fragment& fragment) {
  for (size_t i = 0; i < warp.fragments.size(); ++i) {
    if (warp.fragments[i].state != State::kFinished) continue;
    warp.fragments[i] = fragment;
    return static_cast<int>(i);
  }
  warp.fragments.push_back(fragment);
  return static_cast<int>(warp.fragments.size()) - 1;
}

Fragment child_of(const Fragment& parent, int parent_index, uint32_t pc, uint32_t mask,
                  uint32_t reconverge) {
  Fragment child;
  child.pc = pc;
  child.mask = mask;
  child.reconverge = reconverge;
  child.parent = parent_index;
  child.frame = parent.frame;
  return child;
}

Fragment finished() {
  Fragment fragment;
  fragment.state = State::kFinished;
  return fragment;
}

// A fragment without lanes ends; a parent that waited for it goes on, or ends too.
void finish(Warp& warp, int index) {
  for (;;) {
    Fragment& fragment = warp.fragments[index];
    fragment.state = State::kFinished;
    if (fragment.is_call) free_frame(warp, fragment.frame);
    if (fragment.parent < 0) {
      warp.done = true;
      return;
    }
    index = fragment.parent;
    Fragment& parent = warp.fragments[index];
    if (--parent.children > 0) return;
    if (parent.mask) {
      parent.state = State::kRunnable;
      return;
    }
  }
}

int call_root(const Warp& warp, int index) {
  while (index >= 0 && !warp.fragments[index].is_call) index = warp.fragments[index].parent;
  return index;
}

// The fragment is at its reconvergence point: hands its lanes to its parent. A released parent
// waits for nobody: the fragment goes on in its place.
void join(Warp& warp, int index) {
  Fragment& fragment = warp.fragments[index];
  Fragment& parent = warp.fragments[fragment.parent];
  if (parent.released) {
    fragment.reconverge = parent.reconverge;
    if (parent.parent < 0 || parent.is_call) return;
    const int released = std::exchange(fragment.parent, parent.parent);
    ++warp.fragments[fragment.parent].children;
    if (--parent.children == 0) finish(warp, released);
    return;
  }
  if (!parent.mask) parent.polls = 0;
  parent.mask |= fragment.mask;
  fragment.mask = 0;
  finish(warp, index);
}

void select(Warp& warp, int index) {
  const Fragment& fragment = warp.fragments[index];
  const Frame& frame = warp.frames[fragment.frame];
  warp.current = index;
  warp.function = frame.function;
  warp.bases[0] = frame.registers.get();
  warp.bases[1] = const_cast<std::byte*>(frame.function->constant_pool);
  Worker& worker = *warp.worker;
  if (worker.count) {
    const size_t function = frame.function - worker.launch->launch->program->functions.data();
    worker.current = worker.counters[function].data();
  }
}

enum class Turn : uint8_t { kIdle, kProgress, kPolled };  // kPolled: ended by Step::kYield

template <bool kCount, bool kObserve>
Turn run_fragment(Warp& warp, int index, uint64_t quantum) {
  select(warp, index);
  const Function& function = *warp.function;
  const Instruction* code = function.code.data();
  const auto size = static_cast<uint32_t>(function.code.size());
  const uint64_t begin = warp.executed;
  Observer* observer = kObserve ? observer_of(warp) : nullptr;
  uint32_t pc = warp.fragments[index].pc;
  uint32_t mask = warp.fragments[index].mask;
  uint32_t reconverge = warp.fragments[index].reconverge;
  for (;;) {
    if (pc == reconverge) {
      warp.fragments[index].pc = pc;
      join(warp, index);
      return Turn::kProgress;
    }
    warp.pc = pc;
    if (pc >= size) {  // the end of the body is a return
      if (call_root(warp, index) >= 0) {
        return_lanes(warp, mask);
      } else {
        exit_lanes(warp, mask);
      }
      return Turn::kProgress;
    }
    const Instruction& in = code[pc];
    uint32_t active = mask;
    if (in.guard != kNoSlot) {
      const uint32_t guard = warp.predicate(in.guard);
      active &= in.guard_negated ? ~guard : guard;
    }
    ++warp.executed;
    if (kCount) ++warp.worker->current[pc].executed;
    if (kObserve) observer->execute(warp, in, active);
    if (!active) {
      ++pc;
      continue;
    }
    const Step step = in.run(warp, in, active);
    if (step == Step::kNext) {
      ++pc;
      continue;
    }
    if (step == Step::kJump) {
      const Fragment& fragment = warp.fragments[index];
      if (fragment.state != State::kRunnable || warp.executed - begin > quantum)
        return Turn::kProgress;
      pc = fragment.pc;
      mask = fragment.mask;
      reconverge = fragment.reconverge;
      continue;
    }
    if (step == Step::kYield) {
      warp.fragments[index].pc = pc + 1;
      return Turn::kPolled;
    }
    --warp.executed;
    if (kCount) --warp.worker->current[pc].executed;
    warp.fragments[index].pc = pc;
    return warp.executed != begin ? Turn::kProgress : Turn::kIdle;
  }
}

// Lanes that wait for others which poll memory: perhaps the others wait for them.
void release_starved(Warp& warp) {
  constexpr int kPatience = 32;
  bool starved = false;
  for (Fragment& fragment : warp.fragments) {
    if (fragment.state != State::kJoining || !fragment.mask || fragment.released) continue;
    starved |= ++fragment.polls > kPatience;
  }
  if (starved) release_joining(warp);
}

[[noreturn]] void fail_divergent(const Warp& warp, uint32_t mask, const char* what,
                                 ReportKind kind) {
  fail(warp, first_lane(warp.live & ~mask), kind,
       format("%s must be executed by all lanes of the warp together: lanes 0x%08x of 0x%08x came.",
              what, mask, warp.live));
}

}  // namespace

bool run_warp(Warp& warp, uint64_t quantum) {
  const bool count = warp.worker->count;
  const bool observe = observer_of(warp) != nullptr;
  auto run = count ? (observe ? run_fragment<true, true> : run_fragment<true, false>)
                   : (observe ? run_fragment<false, true> : run_fragment<false, false>);
  bool progress = false, polled = false;
  for (size_t i = 0; i < warp.fragments.size() && !warp.done; ++i) {
    if (warp.fragments[i].state != State::kRunnable) continue;
    const Turn turn = run(warp, static_cast<int>(i), quantum);
    progress |= turn != Turn::kIdle;
    polled |= turn == Turn::kPolled;
  }
  while (warp.fragments.size() > 1 && warp.fragments.back().state == State::kFinished) {
    warp.fragments.pop_back();
  }
  if (polled) release_starved(warp);
  const uint64_t limit = launch_of(warp).options->max_instructions;
  if (limit && warp.executed > limit) {
    fail(warp, -1, ReportKind::kInstructionLimit,
         format("The warp executed more than the %llu instructions allowed.",
                static_cast<unsigned long long>(limit)));
  }
  return progress;
}

void diverge(Warp& warp, uint32_t taken, uint32_t taken_pc, uint32_t other_pc,
             uint32_t reconverge) {
  const int index = warp.current;
  Fragment& fragment = warp.fragments[index];
  const uint32_t other = fragment.mask & ~taken;
  const bool same_point =
      fragment.parent >= 0 && !fragment.is_call && fragment.reconverge == reconverge;
  if (same_point) {  // a sibling that meets us at the same place, e.g. a loop's next iteration
    const int parent = fragment.parent;
    const Fragment sibling = child_of(warp.fragments[parent], parent, taken_pc, taken, reconverge);
    fragment.mask = other;
    fragment.pc = other_pc;
    ++warp.fragments[parent].children;
    add_fragment(warp, sibling);
    return;
  }
  fragment.state = State::kJoining;
  fragment.pc = reconverge;
  fragment.mask = 0;
  fragment.children = 2;
  const Fragment parent = fragment;  // adding one may move it
  add_fragment(warp, child_of(parent, index, taken_pc, taken, reconverge));
  add_fragment(warp, child_of(parent, index, other_pc, other, reconverge));
}

void exit_lanes(Warp& warp, uint32_t mask) {
  hopper_exit(warp, mask);
  Fragment& fragment = warp.fragment();
  warp.live &= ~mask;
  fragment.mask &= ~mask;
  fragment.pc = warp.pc + 1;
  if (!fragment.mask) finish(warp, warp.current);
  hopper_exited(warp);
}

void call_function(Warp& warp, uint32_t mask, const Function& callee, uint32_t return_pc) {
  const int index = warp.current;
  const Frame& frame = warp.frames[warp.fragment().frame];
  const int callee_frame = new_frame(warp, callee, frame.local_base + frame.function->local_bytes);
  Fragment& fragment = warp.fragment();
  fragment.state = State::kJoining;
  fragment.pc = return_pc;
  fragment.mask &= ~mask;
  fragment.children = 1;
  Fragment child = child_of(fragment, index, 0, mask, kNoPc);
  child.is_call = true;
  child.frame = callee_frame;
  add_fragment(warp, child);
}

void return_lanes(Warp& warp, uint32_t mask) {
  const int root = call_root(warp, warp.current);
  if (root < 0) {  // an entry's return is an exit
    exit_lanes(warp, mask);
    return;
  }
  warp.fragments[warp.fragments[root].parent].mask |= mask;
  Fragment& fragment = warp.fragment();
  fragment.mask &= ~mask;
  fragment.pc = warp.pc + 1;
  if (!fragment.mask) finish(warp, warp.current);
}

bool gather(Warp& warp, uint32_t member, uint32_t* mask, const char* what) {
  const uint32_t needed = member & warp.live;
  Fragment& self = warp.fragment();
  if ((*mask & ~member) != 0) {
    fail(warp, first_lane(*mask & ~member), ReportKind::kDivergence,
         format("A lane executes %s without being in its membermask 0x%08x.", what, member));
  }
  if ((*mask & needed) == needed) {
    self.wait = Wait();
    return true;
  }
  uint32_t all = *mask;
  auto waits_here = [&](const Fragment& other) {
    return &other != &self && other.state == State::kRunnable && other.frame == self.frame &&
           other.pc == warp.pc && other.wait.kind == Wait::Kind::kWarpSync &&
           other.wait.id == member;
  };
  for (const Fragment& other : warp.fragments) {
    if (waits_here(other)) all |= static_cast<uint32_t>(other.wait.generation);
  }
  if ((all & needed) != needed) {
    self.wait = {Wait::Kind::kWarpSync, member, *mask, what};
    return false;
  }
  for (Fragment& other : warp.fragments) {
    if (!waits_here(other)) continue;
    ++other.pc;
    other.wait = Wait();
  }
  self.wait = Wait();
  *mask = all;
  return true;
}

bool reconverge(Warp& warp, uint32_t mask) {
  if (mask != warp.live || mask == warp.fragment().mask || call_root(warp, warp.current) >= 0)
    return false;
  const int frame = warp.fragment().frame;
  for (Fragment& fragment : warp.fragments) fragment = finished();
  warp.fragment() = Fragment();
  warp.fragment().pc = warp.pc + 1;
  warp.fragment().mask = mask;
  warp.fragment().frame = frame;
  warp.released = false;
  return true;
}

bool release_joining(Warp& warp) {
  bool any = false;
  const size_t count = warp.fragments.size();
  for (size_t i = 0; i < count; ++i) {
    Fragment& fragment = warp.fragments[i];
    if (fragment.state != State::kJoining || !fragment.mask || fragment.released) continue;
    const bool stays = fragment.parent < 0 || fragment.is_call;
    const int parent = stays ? static_cast<int>(i) : fragment.parent;
    const Fragment ahead =
        child_of(fragment, parent, fragment.pc, fragment.mask, fragment.reconverge);
    fragment.released = true;
    fragment.mask = 0;
    ++warp.fragments[parent].children;
    add_fragment(warp, ahead);
    any = true;
  }
  warp.released |= any;
  return any;
}

void require_aligned(const Warp& warp, uint32_t mask, const char* what) {
  if (mask == warp.live || warp.released || !reports(warp, ReportKind::kAlignedBarrier)) return;
  fail_divergent(warp, mask, what, ReportKind::kAlignedBarrier);
}

bool split_off(Warp& warp, uint32_t mask) {
  if (mask == warp.fragment().mask) return false;
  diverge(warp, mask, warp.pc, warp.pc + 1, warp.pc + 1);
  return true;
}

uint32_t uniform(const Warp& warp, Slot slot, uint32_t mask, const char* what) {
  const uint32_t* values = warp.lanes<uint32_t>(slot);
  const uint32_t value = values[first_lane(mask)];
  for_each_lane(mask, [&](int lane) {
    if (values[lane] != value) {
      fail(warp, lane, ReportKind::kInvalidOperand,
           format("The lanes disagree about %s: %u and %u.", what, value, values[lane]));
    }
  });
  return value;
}

void require_converged(const Warp& warp, uint32_t mask, const char* what) {
  if (mask != warp.live) fail_divergent(warp, mask, what, ReportKind::kDivergence);
}

void require_whole_warp(const Warp& warp, uint32_t mask, const char* what) {
  require_converged(warp, mask, what);
  if (mask == kAllLanes) return;
  fail(warp, first_lane(~mask), ReportKind::kDivergence,
       format("%s by a warp of fewer lanes.", what));
}

}  // namespace gpu_emulator::exec
