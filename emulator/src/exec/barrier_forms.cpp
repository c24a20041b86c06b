// Barriers of the CTA and the warp, memory fences (PTX 9.7.13).

#include <algorithm>
#include <utility>

#include "decode.h"
#include "function_decoder.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Operand;
using ptx::Type;

void tell(Warp& warp, SyncKind kind, uint32_t mask, uint32_t id) {
  if (Observer* observer = observer_of(warp)) {
    observer->synchronise(warp, {kind, mask, id, Order::kAcqRel, Scope::kCta});
  }
}

bool is_complete(const Cta& cta, const NamedBarrier::Phase& phase) {
  if (!phase.whole_cta) return phase.threads >= phase.expected;
  return std::all_of(cta.warps.begin(), cta.warps.end(),
                     [&](const auto& warp) { return !warp->live || phase.arrivals[warp->id] > 0; });
}

// To those that wait: others may complete the barrier again before they go on.
void give_votes(Cta& cta, const NamedBarrier& barrier, uint32_t id) {
  for (const auto& warp : cta.warps) {
    for (Fragment& fragment : warp->fragments) {
      Wait& wait = fragment.wait;
      const bool waits = wait.kind == Wait::Kind::kBarrier && wait.id == id &&
                         wait.generation == barrier.generation;
      if (waits) wait.votes = barrier.phase.votes;
    }
  }
}

void complete(Warp& warp, NamedBarrier& barrier, uint32_t id) {
  if (barrier.phase.reduces) give_votes(*warp.cta, barrier, id);
  barrier.previous_arrivals = barrier.phase.arrivals;
  barrier.phase = {};
  ++barrier.generation;
  tell(warp, SyncKind::kBarrierComplete, kAllLanes, id);
}

// The thread count of the instruction; 0 where it names none.
uint32_t thread_count(const Warp& warp, const Instruction& in, uint32_t mask) {
  if (in.b == kNoSlot) return 0;
  const uint32_t count = uniform(warp, in.b, mask, "the thread count of the barrier");
  if (count % kWarpSize || (!count && options<BarrierOptions>(in).kind == BarrierKind::kArrive)) {
    fail(warp, first_lane(mask), ReportKind::kBarrier,
         format("The thread count of a barrier must be a multiple of 32, not %u%s.", count,
                count ? "" : ", in barrier.arrive"));
  }
  return count;
}

// What PTX forbids in one phase: other thread counts, barrier.red beside sync and arrive, and
// second arrivals where each warp of the CTA must arrive.
void check_arrival(const Warp& warp, int lane, uint32_t id, uint32_t expected, bool reduces) {
  const NamedBarrier::Phase& phase = warp.cta->barriers[id].phase;
  if (!phase.threads) return;
  if (phase.expected != expected) {
    fail(warp, lane, ReportKind::kBarrier,
         format("Barrier %u: this warp expects %u threads, others %u.", id, expected,
                phase.expected));
  }
  if (phase.reduces != reduces && reports(warp, ReportKind::kBarrierReduction)) {
    fail(warp, lane, ReportKind::kBarrierReduction,
         format("Barrier %u: barrier.red meets barrier.sync or barrier.arrive before the others "
                "came: its result is not defined.",
                id));
  }
}

void check_repetition(const Warp& warp, int lane, uint32_t id) {
  const NamedBarrier::Phase& phase = warp.cta->barriers[id].phase;
  if (!phase.whole_cta || !phase.repeats || !reports(warp, ReportKind::kBarrierAgain)) return;
  const auto again =
      std::find_if(phase.arrivals.begin(), phase.arrivals.end(), [](uint32_t n) { return n > 1; });
  fail(warp, lane, ReportKind::kBarrierAgain,
       format("Barrier %u: warp %td arrives again before the others came, and there is no thread "
              "count.",
              id, again - phase.arrivals.begin()));
}

void add(Votes& votes, const Votes& more) {
  votes.all += more.all;
  votes.yes += more.yes;
}

// All lanes of the warp have come.
void arrive(Warp& warp, const Instruction& in, uint32_t mask, uint32_t id) {
  NamedBarrier& barrier = warp.cta->barriers[id];
  NamedBarrier::Phase& phase = barrier.phase;
  const uint32_t count = thread_count(warp, in, mask);
  const auto whole = static_cast<uint32_t>(warp.cta->warps.size()) * kWarpSize;
  const uint32_t expected = count ? count : whole;
  const bool reduces = in.c != kNoSlot;
  check_arrival(warp, first_lane(mask), id, expected, reduces);
  const NamedBarrier::Coming coming = std::exchange(barrier.coming[warp.id], {});
  tell(warp, SyncKind::kBarrierArrive, coming.lanes, id);
  phase.expected = expected;
  phase.threads += kWarpSize;
  phase.whole_cta |= !count;
  phase.reduces |= reduces;
  add(phase.votes, coming.votes);
  phase.repeats |= ++phase.arrivals[warp.id] > 1;
  check_repetition(warp, first_lane(mask), id);
  for (Fragment& fragment : warp.fragments) {
    Wait& wait = fragment.wait;
    const bool came = wait.kind == Wait::Kind::kBarrier && wait.id == id;
    if (came && wait.generation == kNotArrived) wait.generation = barrier.generation;
  }
}

void come(Warp& warp, const Instruction& in, uint32_t mask, uint32_t id) {
  NamedBarrier::Coming& coming = warp.cta->barriers[id].coming[warp.id];
  coming.lanes |= mask;
  warp.fragment().wait = {Wait::Kind::kBarrier, id, kNotArrived, ""};
  if (in.c == kNoSlot) return;
  uint32_t predicate = warp.predicate(in.c);
  if (options<BarrierOptions>(in).negated) predicate = ~predicate;
  add(coming.votes, {static_cast<uint32_t>(__builtin_popcount(mask)),
                     static_cast<uint32_t>(__builtin_popcount(predicate & mask))});
}

void write_result(Warp& warp, const Instruction& in, uint32_t mask, const Votes& votes) {
  switch (options<BarrierOptions>(in).kind) {
    case BarrierKind::kReduceAnd:
      warp.set_predicate(in.d, mask, votes.yes == votes.all ? kAllLanes : 0);
      break;
    case BarrierKind::kReduceOr:
      warp.set_predicate(in.d, mask, votes.yes ? kAllLanes : 0);
      break;
    case BarrierKind::kReducePopc: {
      uint32_t* d = warp.lanes<uint32_t>(in.d);
      for_each_lane(mask, [&](int lane) { d[lane] = votes.yes; });
      break;
    }
    default:
      break;
  }
}

Step run_barrier(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t id = uniform(warp, in.a, mask, "the barrier");
  if (id >= warp.cta->barriers.size()) {
    fail(warp, first_lane(mask), ReportKind::kBarrier,
         format("There is no barrier %u: a CTA has 16.", id));
  }
  if (warp.fragment().wait.kind != Wait::Kind::kBarrier) {
    if (options<BarrierOptions>(in).aligned) require_aligned(warp, mask, "An aligned barrier");
    if (split_off(warp, mask)) return Step::kJump;
    come(warp, in, mask, id);
  }
  // Lanes and warps that exit are not waited for any more, so both are asked again at each retry.
  NamedBarrier& barrier = warp.cta->barriers[id];
  Wait& wait = warp.fragment().wait;
  if (wait.generation == kNotArrived) {
    if (warp.live & ~barrier.coming[warp.id].lanes) return Step::kRetry;
    arrive(warp, in, mask, id);
  }
  const bool is_current = wait.generation == barrier.generation;
  if (is_current && is_complete(*warp.cta, barrier.phase)) complete(warp, barrier, id);
  if (options<BarrierOptions>(in).kind != BarrierKind::kArrive) {
    if (wait.generation == barrier.generation) return Step::kRetry;
    write_result(warp, in, mask, wait.votes);
    tell(warp, SyncKind::kBarrierLeave, mask, id);
  }
  wait = Wait();
  return Step::kNext;
}

void decode_barrier(Decoder& decoder, bool aligned) {
  Instruction& out = decoder.out;
  out.counter_class = InstructionClass::kBarrier;
  decoder.take("cta");
  const int what = decoder.take_any({"sync", "arrive", "red"});
  if (what < 0) throw Unsupported("barrier of this kind");
  BarrierOptions& how = make_options<BarrierOptions>(out);
  how.kind = static_cast<BarrierKind>(what);
  how.aligned = decoder.take("aligned") || aligned;
  out.run = run_barrier;
  size_t next = 0;
  if (what == 2) {
    const int op = decoder.take_any({"and", "or", "popc"});
    if (op < 0) throw Unsupported("reduction of this kind");
    decoder.take_type();
    constexpr BarrierKind kOf[] = {BarrierKind::kReduceAnd, BarrierKind::kReduceOr,
                                   BarrierKind::kReducePopc};
    how.kind = kOf[op];
    out.d = decoder.destination(0, op == 2 ? 4 : 0);
    next = 1;
  }
  out.a = decoder.source(next++, Type::kU32);
  const size_t predicates = what == 2 ? 1 : 0;
  if (decoder.operands() > next + predicates) out.b = decoder.source(next++, Type::kU32);
  if (what == 2) {
    out.c = decoder.source_predicate(decoder.operand(next), &how.negated);
  }
}

void decode_bar(Decoder& decoder) { decode_barrier(decoder, true); }  // bar = barrier.aligned
void decode_barrier_cta(Decoder& decoder) { decode_barrier(decoder, false); }

Step run_warp_sync(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t member = uniform(warp, in.a, mask, "the membermask");
  if (!gather(warp, member, &mask, "bar.warp.sync")) return Step::kRetry;
  tell(warp, SyncKind::kWarpSync, mask, member);
  return reconverge(warp, mask) ? Step::kJump : Step::kNext;
}

void decode_warp_sync(Decoder& decoder) {
  decoder.out.a = decoder.source(0, Type::kB32);
  decoder.out.run = run_warp_sync;
  decoder.out.counter_class = InstructionClass::kBarrier;
}

// Fences between threads. The host's own order is what other host threads see.
Step run_fence(Warp& warp, const Instruction& in, uint32_t mask) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (Observer* observer = observer_of(warp)) {
    observer->synchronise(warp, {SyncKind::kFence, mask, 0, in.order, in.scope});
  }
  return Step::kNext;
}

void decode_fence(Decoder& decoder) {
  Instruction& out = decoder.out;
  out.order = Order::kAcqRel;
  decoder.memory_order();
  out.run = run_fence;
  out.counter_class = InstructionClass::kBarrier;
}

void decode_membar(Decoder& decoder) {
  Instruction& out = decoder.out;
  out.order = Order::kSeqCst;
  constexpr Scope kScopes[] = {Scope::kCta, Scope::kGpu, Scope::kSys};
  const int scope = decoder.take_any({"cta", "gl", "sys"});
  if (scope < 0) throw Unsupported("membar of this kind");
  out.scope = kScopes[scope];
  out.run = run_fence;
  out.counter_class = InstructionClass::kBarrier;
}

constexpr Form kForms[] = {
    {"bar", decode_bar},     {"bar.warp.sync", decode_warp_sync}, {"barrier", decode_barrier_cta},
    {"fence", decode_fence}, {"membar", decode_membar},
};

}  // namespace

std::span<const Form> barrier_forms() { return kForms; }

}  // namespace gpu_emulator::exec
