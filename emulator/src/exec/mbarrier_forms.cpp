// mbarrier.* and cp.async.mbarrier.arrive (PTX 9.7.13.15, 9.7.9.25.3.4).

#include <cstring>

#include "async.h"
#include "decode.h"
#include "hopper_state.h"
#include "mbarrier.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

constexpr uint32_t kMbarrierBytes = 8;

// What the 8 bytes hold while the object is valid.
uint64_t signature(uint32_t offset) {
  return 0x6d62617272696572u ^ uint64_t { offset } << 32;
}

[[noreturn]] void fail_misuse(const Warp& warp, int lane, uint64_t address, const char* rule,
                              ReportKind kind = ReportKind::kMbarrier) {
  fail(warp, lane, kind,
       format("Misuse of the mbarrier at shared address 0x%llx: %s.",
              static_cast<unsigned long long>(address), rule));
}

AccessForm access_form(AccessKind kind, Order order) {
  AccessForm form;
  form.space = Space::kShared;
  form.kind = kind;
  form.order = order;
  form.scope = Scope::kCluster;
  form.bytes = form.alignment = kMbarrierBytes;
  form.counted = false;
  return form;
}

void show_access(Warp& warp, uint32_t mask, const uint64_t* address) {
  std::byte* host[kWarpSize];
  resolve(warp, access_form(AccessKind::kAtomic, Order::kRelaxed), mask, address, host);
}

void show_event(Warp& warp, SyncKind kind, uint32_t mask, uint64_t address,
                Order order = Order::kWeak, Scope scope = Scope::kNone) {
  if (Observer* observer = observer_of(warp)) {
    observer->synchronise(warp, {kind, mask, static_cast<uint32_t>(address), order, scope});
  }
}

// One event for the lanes of each address.
void show_events(Warp& warp, SyncKind kind, uint32_t mask, const uint64_t* address,
                 const Instruction& in) {
  while (mask) {
    const uint64_t first = address[first_lane(mask)];
    uint32_t same = 0;
    for_each_lane(mask, [&](int lane) {
      if (address[lane] == first) same |= 1u << lane;
    });
    show_event(warp, kind, same, first, in.order, in.scope);
    mask &= ~same;
  }
}

void end_phase(Warp& warp, int lane, uint64_t address, Mbarrier& barrier) {
  if (!barrier.end_phase()) return;
  warp.cta->cluster->expired_waits = 0;
  show_event(warp, SyncKind::kMbarrierComplete, 1u << lane, address);
}

void require_own_cta(const Warp& warp, int lane, uint64_t address) {
  if (address >> kSharedRankShift == warp.cta->rank) return;
  fail_misuse(warp, lane, address, "this operation is only for mbarriers of the thread's own CTA");
}

// ---------------------------------------------------------------------------------- init and inval

Step run_init(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  shared_addresses(warp, in, mask, address, "mbarrier");
  const uint32_t* count = warp.lanes<uint32_t>(in.b);
  std::byte* host[kWarpSize];
  resolve(warp, access_form(AccessKind::kStore, Order::kWeak), mask, address, host);
  for_each_lane(mask, [&](int lane) {
    require_own_cta(warp, lane, address[lane]);
    if (count[lane] == 0 || count[lane] > Mbarrier::kMaxCount) {
      fail_misuse(warp, lane, address[lane], "the count must be from 1 to 2^20 - 1");
    }
    const uint32_t offset = address[lane] & kSharedOffsetMask;
    const uint64_t mark = signature(offset);
    auto& barriers = hopper(*warp.cta).mbarriers;
    const bool is_valid = barriers.count(offset) && !std::memcmp(host[lane], &mark, sizeof(mark));
    if (is_valid && reports(warp, ReportKind::kMbarrierAgain)) {
      fail_misuse(warp, lane, address[lane], "it is initialised already",
                  ReportKind::kMbarrierAgain);
    }
    barriers.insert_or_assign(offset, Mbarrier(count[lane]));
    std::memcpy(host[lane], &mark, sizeof(mark));
    show_event(warp, SyncKind::kMbarrierInit, 1u << lane, address[lane]);
  });
  return Step::kNext;
}

Step run_inval(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  shared_addresses(warp, in, mask, address, "mbarrier");
  for_each_lane(mask, [&](int lane) {
    require_own_cta(warp, lane, address[lane]);
    mbarrier_at(warp, lane, address[lane]);
  });
  std::byte* host[kWarpSize];
  resolve(warp, access_form(AccessKind::kAtomic, Order::kRelaxed), mask, address, host);
  for_each_lane(mask, [&](int lane) {
    hopper(*warp.cta).mbarriers.erase(address[lane] & kSharedOffsetMask);
    std::memset(host[lane], kPoison, kMbarrierBytes);
    show_event(warp, SyncKind::kMbarrierInvalidate, 1u << lane, address[lane]);
  });
  return Step::kNext;
}

// ------------------------------------------------------------------------------ arrivals, tx-count

// b: count (absent: 1) or bytes; d: state.
const char* apply(const Instruction& in, Mbarrier& barrier, uint32_t value) {
  const MbarrierOptions how = options<MbarrierOptions>(in);
  if (how.update == MbarrierUpdate::kExpect) return barrier.expect(value);
  if (how.update == MbarrierUpdate::kComplete) return barrier.complete(value);
  const char* broken = nullptr;
  uint32_t count = value;
  if (how.expect_first) {
    broken = barrier.expect(value);
    count = 1;
  }
  if (!broken && how.drop) broken = barrier.drop(count);
  if (broken) return broken;
  return how.no_complete ? barrier.arrive_no_complete(count) : barrier.arrive(count);
}

Step run_update(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  shared_addresses(warp, in, mask, address, "mbarrier");
  for_each_lane(mask, [&](int lane) { mbarrier_at(warp, lane, address[lane]); });
  show_access(warp, mask, address);
  const uint32_t* value = in.b == kNoSlot ? nullptr : warp.lanes<uint32_t>(in.b);
  if (options<MbarrierOptions>(in).update == MbarrierUpdate::kArrive) {
    show_events(warp, SyncKind::kMbarrierArrive, mask, address, in);
  }
  for_each_lane(mask, [&](int lane) {
    Mbarrier& barrier = mbarrier_at(warp, lane, address[lane]);
    if (in.d != kNoSlot) warp.lanes<uint64_t>(in.d)[lane] = barrier.state();
    if (const char* rule = apply(in, barrier, value ? value[lane] : 1)) {
      fail_misuse(warp, lane, address[lane], rule);
    }
    end_phase(warp, lane, address[lane], barrier);
  });
  return Step::kNext;
}

// ------------------------------------------------------------------------------------------- waits

bool is_complete(Warp& warp, const Instruction& in, int lane, uint64_t address) {
  const Mbarrier& barrier = mbarrier_at(warp, lane, address);
  if (options<MbarrierWaitOptions>(in).parity) {
    return (barrier.phase() & 1) != (warp.lanes<uint32_t>(in.b)[lane] & 1);
  }
  const uint64_t awaited = Mbarrier::phase_of(warp.lanes<uint64_t>(in.b)[lane]);
  if (awaited != barrier.phase() && awaited + 1 != barrier.phase()) {
    fail_misuse(warp, lane, address,
                "the state waited for is neither of the current nor of the preceding phase");
  }
  return awaited != barrier.phase();
}

// Where a phase is not complete, the lanes sleep until it is, or until nothing else can go on:
// test_wait and try_wait alike, as how long either takes is not defined.
Step run_wait(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  shared_addresses(warp, in, mask, address, "mbarrier");
  uint32_t complete = 0;
  for_each_lane(mask, [&](int lane) {
    require_own_cta(warp, lane, address[lane]);
    complete |= static_cast<uint32_t>(is_complete(warp, in, lane, address[lane])) << lane;
  });
  Wait& wait = warp.fragment().wait;
  const bool expired = wait.expired;
  if (complete != mask && !expired) {
    const uint64_t where = address[first_lane(mask & ~complete)];
    wait = Wait();
    wait.kind = Wait::Kind::kMbarrier;
    wait.id = static_cast<uint32_t>(where);
    wait.generation = mbarrier_at(warp, first_lane(mask & ~complete), where).phase();
    return Step::kRetry;
  }
  wait = Wait();
  warp.set_predicate(in.d, mask, complete);
  if (complete) show_access(warp, complete, address);
  show_events(warp, SyncKind::kMbarrierWait, complete, address, in);
  return complete == mask ? Step::kNext : Step::kYield;
}

Step run_pending_count(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint64_t* state = warp.lanes<uint64_t>(in.a);
  uint32_t* d = warp.lanes<uint32_t>(in.d);
  for_each_lane(mask, [&](int lane) { d[lane] = Mbarrier::pending_of(state[lane]); });
  return Step::kNext;
}

// ------------------------------------------------------------------------ cp.async.mbarrier.arrive

// The arrival takes effect when the lanes' cp.async so far are complete.
Step run_copy_arrive(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t address[kWarpSize];
  shared_addresses(warp, in, mask, address, "mbarrier");
  for_each_lane(mask, [&](int lane) {
    require_own_cta(warp, lane, address[lane]);
    Mbarrier& barrier = mbarrier_at(warp, lane, address[lane]);
    const bool counted = options<CopyArriveOptions>(in).no_increment;
    const char* rule = counted ? nullptr : barrier.add_arrival();
    if (rule) fail_misuse(warp, lane, address[lane], rule);
    const IssueSite site = issue_site(warp, lane);
    const uint64_t where = address[lane];
    auto complete = [site, where] {
      at_site(site, [&] {
        Warp& issuer = *site.warp;
        complete_copies(issuer, 1u << site.lane, 0);
        Mbarrier& arrived = mbarrier_at(issuer, site.lane, where);
        uint64_t addresses[kWarpSize] = {};
        addresses[site.lane] = where;
        show_access(issuer, 1u << site.lane, addresses);
        show_event(issuer, SyncKind::kMbarrierArrive, 1u << site.lane, where, Order::kRelease,
                   Scope::kCta);
        if (const char* broken = arrived.arrive(1)) fail_misuse(issuer, site.lane, where, broken);
        end_phase(issuer, site.lane, where, arrived);
      });
    };
    warp.cta->cluster->submit({complete, nullptr, "cp.async.mbarrier.arrive"});
  });
  return Step::kNext;
}

// ---------------------------------------------------------------------------------------- decoding

void decode_address(Decoder& decoder, size_t operand) {
  decoder.set_address(decoder.operand(operand));
  decoder.out.space = decoder.take_space();
  if (decoder.out.space != Space::kShared && decoder.out.space != Space::kGeneric) {
    throw Unsupported("state space");
  }
  if (decoder.out.space == Space::kGeneric && !decoder.out.wide_address) {
    throw Unsupported("generic address of 32 bits");
  }
  decoder.take("b64");
  decoder.out.counter_class = InstructionClass::kBarrier;
}

void decode_init(Decoder& decoder) {
  decode_address(decoder, 0);
  decoder.out.b = decoder.source(1, ptx::Type::kU32);
  decoder.out.run = run_init;
}

void decode_inval(Decoder& decoder) {
  decode_address(decoder, 0);
  decoder.out.run = run_inval;
}

// Default order of arrivals: release; of waits: acquire; scope: cta.
void decode_order(Decoder& decoder, Order order) {
  decoder.out.order = order;
  decoder.out.scope = Scope::kCta;
  decoder.memory_order();
}

void decode_transfer(Decoder& decoder, MbarrierUpdate update) {
  decode_order(decoder, Order::kRelaxed);
  decode_address(decoder, 0);
  decoder.out.b = decoder.source(1, ptx::Type::kU32);
  make_options<MbarrierOptions>(decoder.out).update = update;
  decoder.out.run = run_update;
}
void decode_expect(Decoder& decoder) { decode_transfer(decoder, MbarrierUpdate::kExpect); }
void decode_complete(Decoder& decoder) { decode_transfer(decoder, MbarrierUpdate::kComplete); }

void decode_arrival(Decoder& decoder, bool drop) {
  decode_order(decoder, Order::kRelease);
  MbarrierOptions& how = make_options<MbarrierOptions>(decoder.out);
  how.drop = drop;
  how.expect_first = decoder.take("expect_tx");
  how.no_complete = decoder.take("noComplete");
  const bool has_state = decoder.operand(0).kind != ptx::Operand::Kind::kMemory;
  const size_t next = has_state ? 1 : 0;
  decode_address(decoder, next);
  if (has_state) decoder.out.d = decoder.destination(0, 8, true);
  if (decoder.operands() > next + 1) decoder.out.b = decoder.source(next + 1, ptx::Type::kU32);
  if ((how.expect_first || how.no_complete) && decoder.out.b == kNoSlot) {
    throw Unsupported("no count");
  }
  decoder.out.run = run_update;
}
void decode_arrive(Decoder& decoder) { decode_arrival(decoder, false); }
void decode_arrive_drop(Decoder& decoder) { decode_arrival(decoder, true); }

void decode_wait(Decoder& decoder) {
  decode_order(decoder, Order::kAcquire);
  const bool parity = decoder.take("parity");
  decode_address(decoder, 1);
  decoder.out.d = decoder.destination(0, 0);
  decoder.out.b = decoder.source(2, parity ? ptx::Type::kU32 : ptx::Type::kB64);
  if (decoder.operands() > 3) decoder.source(3, ptx::Type::kU32);  // a hint: how long
  make_options<MbarrierWaitOptions>(decoder.out).parity = parity;
  decoder.out.run = run_wait;
}

void decode_pending_count(Decoder& decoder) {
  decoder.take("b64");
  decoder.out.d = decoder.destination(0, 4);
  decoder.out.a = decoder.source(1, ptx::Type::kB64);
  decoder.out.run = run_pending_count;
}

void decode_copy_arrive(Decoder& decoder) {
  make_options<CopyArriveOptions>(decoder.out).no_increment = decoder.take("noinc");
  decode_address(decoder, 0);
  decoder.out.run = run_copy_arrive;
}

constexpr Form kForms[] = {
    {"mbarrier.init", decode_init},
    {"mbarrier.inval", decode_inval},
    {"mbarrier.expect_tx", decode_expect},
    {"mbarrier.complete_tx", decode_complete},
    {"mbarrier.arrive", decode_arrive},
    {"mbarrier.arrive_drop", decode_arrive_drop},
    {"mbarrier.test_wait", decode_wait},
    {"mbarrier.try_wait", decode_wait},
    {"mbarrier.pending_count", decode_pending_count},
    {"cp.async.mbarrier.arrive", decode_copy_arrive},
};

}  // namespace

Mbarrier& mbarrier_at(Warp& warp, int lane, uint64_t address) {
  Cta& cta = shared_owner(warp, lane, static_cast<uint32_t>(address));
  const uint32_t offset = address & kSharedOffsetMask;
  auto& barriers = hopper(cta).mbarriers;
  const auto found = barriers.find(offset);
  if (found == barriers.end()) fail_misuse(warp, lane, address, "it is not initialised");
  const uint64_t mark = signature(offset);
  if (std::memcmp(cta.shared.get() + (offset - kSharedBase), &mark, sizeof(mark)) != 0) {
    fail_misuse(warp, lane, address, "its bytes were overwritten after its initialisation");
  }
  return found->second;
}

void complete_transfer(Warp& warp, int lane, uint64_t address, uint32_t bytes, Proxy proxy) {
  Mbarrier& barrier = mbarrier_at(warp, lane, address);
  uint64_t addresses[kWarpSize] = {};
  addresses[lane] = address;
  show_access(warp, 1u << lane, addresses);
  if (proxy == Proxy::kAsync) {
    show_event(warp, SyncKind::kMbarrierTransfer, 1u << lane, address);
  } else {
    show_event(warp, SyncKind::kMbarrierArrive, 1u << lane, address, Order::kRelease,
               Scope::kCluster);
  }
  if (const char* rule = barrier.complete(bytes)) fail_misuse(warp, lane, address, rule);
  end_phase(warp, lane, address, barrier);
}

std::span<const Form> mbarrier_forms() { return kForms; }

}  // namespace gpu_emulator::exec
