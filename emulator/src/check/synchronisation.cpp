// Synchronising operations: what they do to the clocks.

#include "launch_checker.h"

namespace gpu_emulator::check {
namespace {

constexpr uint32_t kMbarrierInitFence = 1;  // SyncEvent::id

}  // namespace

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
  CtaBarrierClock& clock = cluster.order.ctas[warp.cta->rank].barriers[event.id & 15];
  WarpOrder& order = state_of(warp).order;
  if (event.kind == SyncKind::kBarrierArrive) {
    arrive(warp, event, clock.pending);
    clock.arrived.push_back(order.agent);
  } else if (event.kind == SyncKind::kBarrierComplete) {
    const auto released = std::make_shared<const Clock>(std::move(clock.pending));
    for (uint32_t agent : clock.arrived) clock.released[agent] = released;
    clock.pending = Clock(cluster.order.agents);
    clock.arrived.clear();
  } else {
    order.acquire(event.mask, *clock.released.at(order.agent));
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
  if (barrier.init_is_fenced || !checks_[ReportKind::kInitFence]) return;
  const int lane = exec::first_lane(event.mask);
  const PartialEntry& init = barrier.init;
  const Clock& clock = state_of(warp).order.clock_of(lane);
  if (!clock.own.has_seen(View::kFenced, init.agent, init.lanes, init.stamp)) {
    exec::fail(warp, lane, ReportKind::kInitFence,
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

}  // namespace gpu_emulator::check
