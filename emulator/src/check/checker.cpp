#include "checker.h"

#include "../exec/report.h"
#include "global_memory.h"
#include "sites.h"
#include "state.h"
#include "values.h"

namespace gpu_emulator::check {

using exec::Access;
using exec::AccessKind;
using exec::for_each_lane;
using exec::format;
using exec::kSharedBase;
using exec::kSharedOffsetMask;
using exec::kSharedRankShift;
using exec::kWarpSize;
using exec::Proxy;
using exec::ReportKind;
using exec::Scope;
using exec::Space;
using exec::SyncEvent;
using exec::SyncKind;
using exec::Warp;

namespace {

constexpr uint32_t kMbarrierInitFence = 1;  // SyncEvent::id

const char* name_of(Space space) { return space == Space::kShared ? "shared" : "global"; }

bool is_in_own_cta(const Warp& warp, const Access& access) {
  bool own = true;
  for_each_lane(access.mask, [&](int lane) {
    own &= access.address[lane] >> kSharedRankShift == warp.cta->rank;
  });
  return own;
}

class Checker final : public exec::Observer, private Reporter {
 public:
  explicit Checker(const exec::LaunchState& launch)
      : launch_(launch), sites_(launch), values_(*launch.launch->program) {}

  void cluster_begins(exec::Cluster& cluster) override;
  void cluster_ends(exec::Cluster& cluster) override;
  void access(Warp& warp, const Access& access) override;
  void async_begins(Warp& warp, const Access& access) override;
  void synchronise(Warp& warp, const SyncEvent& event) override;
  void execute(Warp& warp, const exec::Instruction& in, uint32_t mask) override {
    if (launch_.options->check_init) values_.execute(warp, in, mask);
  }

 private:
  Actor actor_of(Warp& warp, const Access& access) const;
  void access_shared(Warp& warp, const Access& access);
  void access_global(Warp& warp, const Access& access);
  void access_local(Warp& warp, const Access& access);
  uint64_t access_shared_lane(const Actor& actor, const Access& access, int lane);
  void strong(Warp& warp, const Access& access);
  void repeat_strong_reads(Warp& warp);
  void found_undefined(Warp& warp, const Access& access, int lane, uint64_t undefined);
  void require_defined(Warp& warp, const Access& access, int lane, uint64_t undefined);
  void barrier(Warp& warp, const SyncEvent& event);
  void mbarrier(Warp& warp, const SyncEvent& event);
  void require_fenced_init(Warp& warp, const SyncEvent& event, BarrierClock& barrier);
  void cluster_barrier(Warp& warp, const SyncEvent& event);
  void arrive(Warp& warp, const SyncEvent& event, Clock& pending);
  void fence_inits(Warp& warp, uint32_t mask);

  [[noreturn]] void conflict(const Actor& actor, int lane, const Previous& previous,
                             const Place& place) override;
  [[noreturn]] void missing_fence(const Actor& actor, int lane, const Previous& previous,
                                  const Place& place) override;
  bool same_value(const Actor& actor, int lane, int other) override;
  std::string describe(const Previous& previous) const;

  const exec::LaunchState& launch_;
  Sites sites_;
  Values values_;
  GlobalMemory global_;
  LaunchReleases releases_;
  std::mutex clusters_mutex_;
  std::unordered_map<const exec::Cluster*, std::unique_ptr<ClusterState>> clusters_;
};

// -----------------------------------------------------------------------------------------
// clusters

void Checker::cluster_begins(exec::Cluster& cluster) {
  auto state = std::make_unique<ClusterState>();
  state->order.index = cluster.index;
  state->order.ctas.resize(cluster.ctas.size());
  size_t agents = 0;
  for (const auto& cta : cluster.ctas) agents += cta->warps.size();
  state->order.agents = static_cast<int>(agents);
  const Clock nothing(state->order.agents);
  state->order.barrier = {nothing, nothing, {}, true};
  for (const auto& cta : cluster.ctas) {
    for (BarrierClock& barrier : state->order.ctas[cta->rank].barriers) {
      barrier = {nothing, nothing, {}, true};
    }
    state->shared.push_back(std::make_unique<SharedShadow>(
        Space::kShared, uint64_t{cta->rank} << kSharedRankShift | kSharedBase, cta->shared_bytes,
        launch_.options->check_init));
    for (const auto& warp : cta->warps) {
      auto own = std::make_unique<WarpState>();
      own->order.cluster = &state->order;
      own->order.agent = static_cast<uint32_t>(state->warps.size());
      own->order.lanes = warp->live;
      own->order.groups.push_back({exec::kAllLanes, nothing});
      warp->observed = own.get();
      state->warps.push_back(std::move(own));
    }
  }
  cluster.observed = state.get();
  const std::lock_guard lock(clusters_mutex_);
  clusters_[&cluster] = std::move(state);
}

void Checker::cluster_ends(exec::Cluster& cluster) {
  std::unique_ptr<ClusterState> state;
  {
    const std::lock_guard lock(clusters_mutex_);
    state = std::move(clusters_.extract(&cluster).mapped());
  }
  cluster.observed = nullptr;
  if (!state->undefined_output.empty()) {
    throw exec::Failure(ReportKind::kUninitialised, state->undefined_output);
  }
}

// -----------------------------------------------------------------------------------------
// accesses

Actor Checker::actor_of(Warp& warp, const Access& access) const {
  WarpState& state = state_of(warp);
  const bool is_strong = access.kind == AccessKind::kAtomic || access.order != exec::Order::kWeak;
  AccessState kind = is_strong ? AccessState::kStrong : AccessState::kPlain;
  if (access.proxy == Proxy::kAsync) {
    kind = access.kind == AccessKind::kAtomic ? AccessState::kAsyncStrong : AccessState::kAsync;
  }
  return {&warp,
          &state.order,
          state.order.common_clock(access.mask),
          kind,
          access.kind != AccessKind::kLoad,
          launch_.options->check_races,
          sites_.site(warp.function, warp.pc),
          {}};
}

void Checker::access(Warp& warp, const Access& access) {
  repeat_strong_reads(warp);
  switch (access.space) {
    case Space::kShared:
      access_shared(warp, access);
      break;
    case Space::kGlobal:
      access_global(warp, access);
      break;
    case Space::kLocal:
      access_local(warp, access);
      return;
    default:
      return;
  }
  const bool is_strong = access.kind == AccessKind::kAtomic || access.order != exec::Order::kWeak;
  if (is_strong && access.proxy == Proxy::kGeneric) strong(warp, access);
}

uint64_t Checker::access_shared_lane(const Actor& actor, const Access& access, int lane) {
  Warp& warp = *actor.warp;
  const uint64_t address = access.address[lane];
  SharedShadow& shadow = *state_of(*warp.cta->cluster).shared[address >> kSharedRankShift];
  const auto offset = static_cast<uint32_t>((address & kSharedOffsetMask) - kSharedBase);
  if (access.kind == AccessKind::kLoad) {
    return access.proxy == Proxy::kAsync
               ? shadow.finish_read(actor, lane, offset, access.bytes, *this)
               : shadow.read(actor, lane, offset, access.bytes, *this);
  }
  if (access.proxy == Proxy::kCopy) {
    uint64_t& undefined = state_of(warp).copied[lane];
    shadow.finish_write(actor, lane, offset, access.bytes, undefined, *this);
    undefined = 0;
  } else if (access.proxy == Proxy::kAsync) {
    shadow.finish_write(actor, lane, offset, access.bytes, 0, *this);
  } else {
    const uint64_t undefined = launch_.options->check_init ? values_.stored(warp, lane) : 0;
    const uint64_t before = shadow.write(actor, lane, offset, access.bytes, undefined, *this);
    if (access.kind == AccessKind::kAtomic) return before;
  }
  return 0;
}

void Checker::access_shared(Warp& warp, const Access& access) {
  const Actor actor = actor_of(warp, access);
  if (access.kind == AccessKind::kLoad && access.proxy == Proxy::kGeneric &&
      access.bytes == kCellBytes && is_in_own_cta(warp, access)) {
    state_of(*warp.cta->cluster)
        .shared[warp.cta->rank]
        ->read_cells(actor, access.mask, access.address, *this, [&](int lane, uint64_t undefined) {
          found_undefined(warp, access, lane, undefined);
        });
    return;
  }
  for_each_lane(access.mask, [&](int lane) {
    const uint64_t undefined = access_shared_lane(actor, access, lane);
    if (undefined) found_undefined(warp, access, lane, undefined);
  });
}

void Checker::access_global(Warp& warp, const Access& access) {
  const Actor actor = actor_of(warp, access);
  const bool writes = access.kind != AccessKind::kLoad;
  GlobalMemory::Cursor pages(global_);
  for_each_lane(access.mask, [&](int lane) {
    if (writes && access.proxy == Proxy::kGeneric && launch_.options->check_init) {
      require_defined(warp, access, lane, values_.stored(warp, lane));
    }
    if (!launch_.options->check_races) return;
    pages.for_each_page(
        access.address[lane], access.bytes,
        [&](GlobalShadow& shadow, uint32_t offset, uint32_t bytes) {
          if (!writes) {
            shadow.read(actor, lane, offset, bytes, *this);
          } else if (access.proxy == Proxy::kAsync && access.kind == AccessKind::kStore) {
            shadow.finish_write(actor, lane, offset, bytes, 0, *this);
          } else {
            shadow.write(actor, lane, offset, bytes, 0, *this);
          }
        });
  });
}

void Checker::access_local(Warp& warp, const Access& access) {
  if (!launch_.options->check_init) return;
  WarpState& state = state_of(warp);
  if (state.local_capacity < warp.local_capacity) {
    std::vector<bool> grown(size_t{warp.local_capacity} * kWarpSize);
    for (size_t lane = 0; lane < kWarpSize; ++lane) {
      for (size_t i = 0; i < state.local_capacity; ++i) {
        grown[lane * warp.local_capacity + i] =
            state.local_defined[lane * state.local_capacity + i];
      }
    }
    state.local_defined = std::move(grown);
    state.local_capacity = warp.local_capacity;
  }
  for_each_lane(access.mask, [&](int lane) {
    const auto first = static_cast<size_t>(access.host[lane] - warp.local.get());
    uint64_t undefined = access.kind == AccessKind::kLoad ? 0 : values_.stored(warp, lane);
    for (uint32_t i = 0; i < access.bytes; ++i) {
      if (access.kind == AccessKind::kLoad) {
        undefined |= uint64_t{!state.local_defined[first + i]} << (i & 63);
      } else {
        state.local_defined[first + i] = !(undefined >> (i & 63) & 1);
      }
    }
    if (access.kind == AccessKind::kLoad && undefined) {
      found_undefined(warp, access, lane, undefined);
    }
  });
}

void Checker::async_begins(Warp& warp, const Access& access) {
  if (!launch_.options->check_races && access.space == Space::kGlobal) return;
  const Actor actor = actor_of(warp, access);
  const AccessState flight =
      access.proxy == Proxy::kAsync ? AccessState::kAsyncFlight : AccessState::kCopyFlight;
  GlobalMemory::Cursor pages(global_);
  for_each_lane(access.mask, [&](int lane) {
    auto begin = [&](auto& shadow, uint32_t offset, uint32_t bytes) {
      if (access.kind == AccessKind::kStore) {
        shadow.begin_write(actor, lane, offset, bytes, flight, *this);
      } else if (access.kind == AccessKind::kLoad) {
        if (access.space == Space::kShared) {
          shadow.begin_read(actor, lane, offset, bytes, *this);
        } else {
          shadow.read(actor, lane, offset, bytes, *this);
        }
      }
    };
    const uint64_t address = access.address[lane];
    if (access.space == Space::kShared) {
      begin(*state_of(*warp.cta->cluster).shared[address >> kSharedRankShift],
            static_cast<uint32_t>((address & kSharedOffsetMask) - kSharedBase), access.bytes);
    } else if (access.space == Space::kGlobal) {
      pages.for_each_page(address, access.bytes, begin);
    }
  });
}

// ----------------------------------------------------------------------------------- strong
// accesses

void Checker::strong(Warp& warp, const Access& access) {
  WarpState& state = state_of(warp);
  auto apply = [&](ReleasesByAddress& locations) {
    for (uint32_t left = access.mask; left;) {
      uint32_t same = 0;
      for_each_lane(left, [&](int lane) {
        if (access.host[lane] == access.host[exec::first_lane(left)]) same |= 1u << lane;
      });
      strong_access(state.order, warp.cta->rank, same, access, locations);
      left &= ~same;
    }
  };
  if (access.space == Space::kShared) {
    apply(state_of(*warp.cta->cluster).order.shared_releases);
    return;
  }
  releases_.with(apply);
  if (access.kind == AccessKind::kStore || launch_.options->threads == 1) return;
  for_each_lane(access.mask, [&](int lane) {
    state.to_repeat.push_back({access, access.address[lane], access.host[lane], lane});
  });
}

void Checker::repeat_strong_reads(Warp& warp) {
  WarpState& state = state_of(warp);
  if (state.to_repeat.empty()) return;
  releases_.with([&](ReleasesByAddress& releases) {
    for (WarpState::StrongRead& read : state.to_repeat) {
      uint64_t address[kWarpSize];
      std::byte* host[kWarpSize];
      address[read.lane] = read.address;
      host[read.lane] = read.host;
      Access again = read.access;
      again.kind = AccessKind::kLoad;
      again.address = address;
      again.host = host;
      strong_access(state.order, warp.cta->rank, 1u << read.lane, again, releases);
    }
  });
  state.to_repeat.clear();
}

// ---------------------------------------------------------------------------------- undefined
// values

void Checker::found_undefined(Warp& warp, const Access& access, int lane, uint64_t undefined) {
  if (!launch_.options->check_init) return;
  WarpState& state = state_of(warp);
  if (state.origin.empty()) {
    state.origin = format("%s memory at 0x%llx, never written, which lane %d read at ",
                          access.space == Space::kLocal ? "local" : name_of(access.space),
                          static_cast<unsigned long long>(access.address[lane]), lane) +
                   sites_.describe(sites_.site(warp.function, warp.pc)) + ".";
  }
  if (access.proxy == Proxy::kGeneric) values_.loaded(warp, lane, undefined);
}

void Checker::require_defined(Warp& warp, const Access& access, int lane, uint64_t undefined) {
  std::string& report = state_of(*warp.cta->cluster).undefined_output;
  if (!undefined || !report.empty()) return;
  const std::string& origin = state_of(warp).origin;
  report = format("An undefined value is written to global memory at 0x%llx.",
                  static_cast<unsigned long long>(access.address[lane])) +
           (origin.empty() ? " It comes from a register that was not written before."
                           : " The first undefined value that this warp read was " + origin) +
           "\n  at " + exec::where(warp, lane);
}

// -----------------------------------------------------------------------------------
// synchronisation

void Checker::arrive(Warp& warp, const SyncEvent& event, Clock& pending) {
  WarpState& state = state_of(warp);
  if (event.order != exec::Order::kRelaxed) {
    state.order.release(event.mask, pending);
    state.order.advance();
    return;
  }
  if (!state.order.fences) return;
  for_each_lane(event.mask, [&](int lane) {
    if (const auto& release = state.order.fences->released[lane]) {
      pending.join(state.order.cluster->index, release->clocks);
    }
  });
}

void Checker::barrier(Warp& warp, const SyncEvent& event) {
  ClusterState& cluster = state_of(*warp.cta->cluster);
  BarrierClock& clock = cluster.order.ctas[warp.cta->rank].barriers[event.id & 15];
  if (event.kind == SyncKind::kBarrierArrive) {
    arrive(warp, event, clock.pending);
  } else if (event.kind == SyncKind::kBarrierComplete) {
    clock.released = std::move(clock.pending);
    clock.pending = Clock(cluster.order.agents);
  } else {
    state_of(warp).order.acquire(event.mask, clock.released);
    Values::tidy(warp);
  }
}

void Checker::mbarrier(Warp& warp, const SyncEvent& event) {
  ClusterState& cluster = state_of(*warp.cta->cluster);
  WarpState& state = state_of(warp);
  BarrierClock& clock = cluster.order.mbarrier(event.id);
  switch (event.kind) {
    case SyncKind::kMbarrierInit:
      clock = {
          Clock(cluster.order.agents),
          Clock(cluster.order.agents),
          {static_cast<uint16_t>(state.order.agent), View::kFenced, event.mask, state.order.stamp},
          false};
      state.order.advance();
      break;
    case SyncKind::kMbarrierInvalidate:
      cluster.order.mbarriers.erase(event.id);
      break;
    case SyncKind::kMbarrierArrive:
      arrive(warp, event, clock.pending);
      break;
    case SyncKind::kMbarrierTransfer:
      require_fenced_init(warp, event, clock);
      clock.pending.own.see(
          {static_cast<uint16_t>(state.order.agent), View::kAsync, ~0u, state.order.stamp});
      state.order.advance();
      break;
    case SyncKind::kMbarrierComplete:
      clock.released.join(clock.pending);
      clock.pending = Clock(cluster.order.agents);
      break;
    default:
      if (event.order != exec::Order::kRelaxed) {
        state.order.acquire(event.mask, clock.released);
        break;
      }
      // In force after the next fence.
      if (!state.order.fences) state.order.fences = std::make_unique<FenceClocks>();
      for_each_lane(event.mask, [&](int lane) {
        join(state.order.fences->acquired[lane], clock.released.all(cluster.order.index));
      });
      break;
  }
}

// The async proxy completes a transaction on an mbarrier, whose init must be visible to it.
void Checker::require_fenced_init(Warp& warp, const SyncEvent& event, BarrierClock& barrier) {
  if (barrier.init_is_fenced || !launch_.options->check_races) return;
  const int lane = exec::first_lane(event.mask);
  const PartialEntry& init = barrier.init;
  const Clock& clock = state_of(warp).order.clock_of(lane);
  if (!clock.own.has_seen(View::kFenced, init.agent, init.lanes, init.stamp)) {
    exec::fail(warp, lane, ReportKind::kMissingFence,
               format("This operation of the async proxy signals the mbarrier at 0x%x, whose init "
                      "no fence.mbarrier_init or fence.proxy.async has made visible to it.\n  "
                      "initialised by ",
                      event.id) +
                   sites_.describe_thread(warp.cta->cluster->index, init.agent, init.lanes));
  }
  barrier.init_is_fenced = true;
}

void Checker::cluster_barrier(Warp& warp, const SyncEvent& event) {
  ClusterState& cluster = state_of(*warp.cta->cluster);
  BarrierClock& clock = cluster.order.barrier;
  if (event.kind == SyncKind::kClusterArrive) {
    arrive(warp, event, clock.pending);
  } else if (event.kind == SyncKind::kClusterComplete) {
    clock.released = std::move(clock.pending);
    clock.pending = Clock(cluster.order.agents);
  } else {
    state_of(warp).order.acquire(event.mask, clock.released);
  }
}

// fence.mbarrier_init: of the inits by the lanes of mask.
void Checker::fence_inits(Warp& warp, uint32_t mask) {
  ClusterOrder& order = state_of(*warp.cta->cluster).order;
  for (auto& [address, barrier] : order.mbarriers) {
    const bool own = barrier.init.agent == state_of(warp).order.agent;
    if (own && (barrier.init.lanes & mask)) barrier.init_is_fenced = true;
  }
}

void Checker::synchronise(Warp& warp, const SyncEvent& event) {
  repeat_strong_reads(warp);
  WarpOrder& order = state_of(warp).order;
  switch (event.kind) {
    case SyncKind::kBarrierArrive:
    case SyncKind::kBarrierComplete:
    case SyncKind::kBarrierLeave:
      barrier(warp, event);
      break;
    case SyncKind::kWarpSync:
      order.synchronise_lanes(event.mask);
      break;
    case SyncKind::kFence:
      order.fence(event.mask, event.scope, warp.cta->rank);
      if (event.id == kMbarrierInitFence) fence_inits(warp, event.mask);
      break;
    case SyncKind::kProxyFence:
      order.proxy_fence(event.mask);
      break;
    case SyncKind::kMbarrierInit:
    case SyncKind::kMbarrierInvalidate:
    case SyncKind::kMbarrierArrive:
    case SyncKind::kMbarrierTransfer:
    case SyncKind::kMbarrierComplete:
    case SyncKind::kMbarrierWait:
      mbarrier(warp, event);
      break;
    case SyncKind::kClusterArrive:
    case SyncKind::kClusterComplete:
    case SyncKind::kClusterWait:
      cluster_barrier(warp, event);
      break;
    case SyncKind::kBulkWait:
    case SyncKind::kWarpgroupWait: {
      // The operands of a wgmma are shown as accesses of the warpgroup's first warp.
      order.see_async(event.mask);
      if (event.kind == SyncKind::kBulkWait || event.id == warp.id) break;
      WarpOrder& first = state_of(*warp.cta->warps[event.id]).order;
      Clock done(state_of(*warp.cta->cluster).order.agents);
      done.own.see({static_cast<uint16_t>(first.agent), View::kAsync, ~0u, first.stamp});
      first.advance();
      order.acquire(event.mask, done);
      break;
    }
    case SyncKind::kCopyWait:
    case SyncKind::kExit:
      break;
  }
}

// -------------------------------------------------------------------------------------------
// reports

std::string Checker::describe(const Previous& previous) const {
  return sites_.describe_thread(previous.cluster, previous.record.agent(), previous.lanes) +
         " at " + sites_.describe(previous.record.site());
}

void Checker::conflict(const Actor& actor, int lane, const Previous& previous, const Place& place) {
  const char* verb = actor.is_write ? "writes" : "reads";
  const std::string where = format("%s memory at 0x%llx (%u bytes)", name_of(place.space),
                                   static_cast<unsigned long long>(place.address), place.bytes);
  if (previous.record.in_flight() || is_async(previous.record.state())) {
    exec::fail(
        *actor.warp, lane, ReportKind::kInFlight,
        format("This thread %s ", verb) + where + ", which an asynchronous operation still " +
            (previous.is_write ? "writes" : "reads") +
            ": no wait for its completion comes between.\n  issued by " + describe(previous));
  }
  exec::fail(*actor.warp, lane, ReportKind::kRace,
             format("Race: this thread %s ", verb) + where +
                 format(", which another access %s; nothing orders the two.\n  other access: ",
                        previous.is_write ? "wrote" : "read") +
                 describe(previous));
}

void Checker::missing_fence(const Actor& actor, int lane, const Previous& previous,
                            const Place& place) {
  exec::fail(*actor.warp, lane, ReportKind::kMissingFence,
             format("An operation of the async proxy %s %s memory at 0x%llx that was written by "
                    "the generic proxy: no fence.proxy.async comes between.\n  written by ",
                    actor.is_write ? "writes" : "reads", name_of(place.space),
                    static_cast<unsigned long long>(place.address)) +
                 describe(previous));
}

bool Checker::same_value(const Actor& actor, int lane, int other) {
  const Warp& warp = *actor.warp;
  const exec::Instruction& in = warp.function->code[warp.pc];
  if (warp.function->effects[warp.pc].flow != exec::Flow::kStore || in.bytes > 4) return false;
  for (int k = 0; k < in.count; ++k) {
    const uint32_t* values = warp.lanes<uint32_t>(warp.list(in)[k]);
    if (values[lane] != values[other]) return false;
  }
  return in.count > 0;
}

}  // namespace

std::unique_ptr<exec::Observer> make_checker(const exec::LaunchState& launch) {
  if (!launch.options->check_init && !launch.options->check_races) return nullptr;
  return std::make_unique<Checker>(launch);
}

}  // namespace gpu_emulator::check
