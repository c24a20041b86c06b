// Barriers of the CTA and the warp, memory fences (PTX 9.7.13).

#include "decode.h"
#include "function_decoder.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

using ptx::Operand;
using ptx::Type;

enum BarrierKind : uint8_t { kSync, kArrive, kReduceAnd, kReduceOr, kReducePopc };

void tell(Warp& warp, SyncKind kind, uint32_t mask, uint32_t id) {
  if (Observer* observer = observer_of(warp)) {
    observer->synchronise(warp, {kind, mask, id, Order::kAcqRel, Scope::kCta});
  }
}

bool is_complete(const Cta& cta, const NamedBarrier& barrier) {
  return barrier.expected ? barrier.units >= barrier.expected
                          : barrier.threads >= cta.live_threads();
}

// To those that wait: others may complete the barrier again before they go on.
void give_votes(Cta& cta, const NamedBarrier& barrier, uint32_t id) {
  for (const auto& warp : cta.warps) {
    for (Fragment& fragment : warp->fragments) {
      Wait& wait = fragment.wait;
      const bool waits = wait.kind == Wait::Kind::kBarrier && wait.id == id &&
                         wait.generation == barrier.generation;
      if (waits) wait.votes = barrier.votes;
    }
  }
}

void complete(Warp& warp, NamedBarrier& barrier, uint32_t id) {
  if (barrier.expected && barrier.units > barrier.expected) {
    fail(warp, -1, ReportKind::kBarrierMisuse,
         format("Barrier %u: %u threads arrived, %u were expected.", id, barrier.units,
                barrier.expected));
  }
  if (barrier.votes.all) give_votes(*warp.cta, barrier, id);
  const uint64_t generation = barrier.generation + 1;
  barrier = NamedBarrier();
  barrier.generation = generation;
  tell(warp, SyncKind::kBarrierComplete, kAllLanes, id);
}

// The thread count of the instruction; 0 = all threads of the CTA.
uint32_t expected_count(const Warp& warp, const Instruction& in, uint32_t mask) {
  if (in.b == kNoSlot) return 0;
  const uint32_t count = uniform(warp, in.b, mask, "the thread count of the barrier");
  if (!count || count % kWarpSize) {
    fail(warp, first_lane(mask), ReportKind::kBarrierMisuse,
         format("The thread count of a barrier must be a multiple of 32, not %u.", count));
  }
  return count;
}

void arrive(Warp& warp, const Instruction& in, uint32_t mask, uint32_t id) {
  NamedBarrier& barrier = warp.cta->barriers[id];
  const uint32_t expected = expected_count(warp, in, mask);
  if (barrier.threads && barrier.expected != expected) {
    fail(warp, first_lane(mask), ReportKind::kBarrierMisuse,
         format("Barrier %u: this warp expects %u threads, others %u.", id, expected,
                barrier.expected));
  }
  if (barrier.lanes[warp.id] & mask) {
    fail(warp, first_lane(barrier.lanes[warp.id] & mask), ReportKind::kBarrierMisuse,
         format("Barrier %u: the warp arrives again before the others came.", id));
  }
  tell(warp, SyncKind::kBarrierArrive, mask, id);
  barrier.expected = expected;
  barrier.lanes[warp.id] |= mask;
  barrier.threads += __builtin_popcount(mask);
  barrier.units += mask == warp.live ? kWarpSize : __builtin_popcount(mask);
  if (in.c != kNoSlot) {  // barrier.red
    uint32_t predicate = warp.predicate(in.c);
    if (in.option[1]) predicate = ~predicate;
    barrier.votes.all += __builtin_popcount(mask);
    barrier.votes.yes += __builtin_popcount(predicate & mask);
  }
}

void write_result(Warp& warp, const Instruction& in, uint32_t mask, const Votes& votes) {
  switch (in.option[0]) {
    case kReduceAnd:
      warp.set_predicate(in.d, mask, votes.yes == votes.all ? kAllLanes : 0);
      break;
    case kReduceOr:
      warp.set_predicate(in.d, mask, votes.yes ? kAllLanes : 0);
      break;
    case kReducePopc: {
      uint32_t* d = warp.lanes<uint32_t>(in.d);
      for_each_lane(mask, [&](int lane) { d[lane] = votes.yes; });
      break;
    }
    default:
      break;
  }
}

// option[2]: .aligned.
Step run_barrier(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t id = uniform(warp, in.a, mask, "the barrier");
  if (id >= warp.cta->barriers.size()) {
    fail(warp, first_lane(mask), ReportKind::kBarrierMisuse,
         format("There is no barrier %u: a CTA has 16.", id));
  }
  NamedBarrier& barrier = warp.cta->barriers[id];
  if (warp.fragment().wait.kind != Wait::Kind::kBarrier) {
    if (in.option[2] && !converge(warp, &mask, "An aligned barrier")) return Step::kRetry;
    arrive(warp, in, mask, id);
    warp.fragment().wait = {Wait::Kind::kBarrier, id, barrier.generation, ""};
  }
  // Warps that exit lower the number of threads of a barrier for all, so it is asked again here.
  const bool is_current = warp.fragment().wait.generation == barrier.generation;
  if (is_current && is_complete(*warp.cta, barrier)) complete(warp, barrier, id);
  if (in.option[0] != kArrive) {
    if (warp.fragment().wait.generation == barrier.generation) return Step::kRetry;
    write_result(warp, in, mask, warp.fragment().wait.votes);
    tell(warp, SyncKind::kBarrierLeave, mask, id);
  }
  warp.fragment().wait = Wait();
  return Step::kNext;
}

void decode_barrier(Decoder& decoder, bool aligned) {
  Instruction& out = decoder.out;
  out.counter_class = InstructionClass::kBarrier;
  decoder.take("cta");
  const int what = decoder.take_any({"sync", "arrive", "red"});
  if (what < 0) throw Unsupported("barrier of this kind");
  out.option[0] = static_cast<uint8_t>(what);
  out.option[2] = decoder.take("aligned") || aligned;
  out.run = run_barrier;
  size_t next = 0;
  if (what == 2) {
    const int op = decoder.take_any({"and", "or", "popc"});
    if (op < 0) throw Unsupported("reduction of this kind");
    decoder.take_type();
    out.option[0] = static_cast<uint8_t>(kReduceAnd + op);
    out.d = decoder.destination(0, op == 2 ? 4 : 0);
    next = 1;
  }
  out.a = decoder.source(next++, Type::kU32);
  const size_t predicates = what == 2 ? 1 : 0;
  if (decoder.operands() > next + predicates) out.b = decoder.source(next++, Type::kU32);
  if (what == 2) {
    bool negated = false;
    out.c = decoder.source_predicate(decoder.operand(next), &negated);
    out.option[1] = negated;
  }
}

void decode_bar(Decoder& decoder) { decode_barrier(decoder, true); }  // bar = barrier.aligned
void decode_barrier_cta(Decoder& decoder) { decode_barrier(decoder, false); }

Step run_warp_sync(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t member = uniform(warp, in.a, mask, "the membermask");
  if (!gather(warp, member, &mask, "bar.warp.sync")) return Step::kRetry;
  tell(warp, SyncKind::kWarpSync, mask, member);
  return Step::kNext;
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
