#include "order.h"

#include <algorithm>

namespace gpu_emulator::check {

using exec::AccessKind;
using exec::Order;
using exec::Scope;

namespace {

bool releases(Order order) {
  return order == Order::kRelease || order == Order::kAcqRel || order == Order::kSeqCst;
}

bool acquires(Order order) {
  return order == Order::kAcquire || order == Order::kAcqRel || order == Order::kSeqCst;
}

// Threads of no cluster and larger scopes are all one: a launch has one device.
Scope normalised(Scope scope) {
  return scope == Scope::kCta || scope == Scope::kCluster ? scope : Scope::kGpu;
}

bool includes(const Release& release, uint64_t cluster, uint32_t rank) {
  if (release.scope == Scope::kGpu) return true;
  return release.cluster == cluster && (release.scope == Scope::kCluster || release.rank == rank);
}

void add_release(std::vector<Release>& list, const Release& release) {
  for (Release& known : list) {
    const bool same = known.scope == release.scope &&
                      (known.scope == Scope::kGpu ||
                       (known.cluster == release.cluster && known.rank == release.rank));
    if (!same) continue;
    join(known.clocks, release.clocks);
    return;
  }
  list.push_back(release);
}

}  // namespace

const Clock& WarpOrder::clock_of(int lane) const {
  for (const LaneGroup& group : groups) {
    if (group.mask >> lane & 1) return group.clock;
  }
  return groups[0].clock;
}

void WarpOrder::advance() {
  if (stamp < Record::kLongestStamp) ++stamp;
}

void WarpOrder::release(uint32_t mask, Clock& into) const {
  for (const LaneGroup& group : groups) {
    if (group.mask & mask) into.join(group.clock);
  }
  into.own.see({static_cast<uint16_t>(agent), View::kGeneric, as_entry_lanes(mask), stamp});
}

// Makes groups such that each lies in mask or outside it.
void WarpOrder::split(uint32_t mask) {
  for (size_t i = 0, count = groups.size(); i < count; ++i) {
    const uint32_t inside = groups[i].mask & mask;
    if (!inside || inside == groups[i].mask) continue;
    groups[i].mask &= ~mask;
    groups.push_back({inside, groups[i].clock});
  }
}

void WarpOrder::merge_equal() {
  for (size_t i = 0; i < groups.size(); ++i) {
    for (size_t k = groups.size(); k-- > i + 1;) {
      if (!(groups[i].clock == groups[k].clock)) continue;
      groups[i].mask |= groups[k].mask;
      groups.erase(groups.begin() + static_cast<ptrdiff_t>(k));
    }
  }
}

void WarpOrder::acquire(uint32_t mask, const Clock& from) {
  split(mask);
  for (LaneGroup& group : groups) {
    if (group.mask & mask) group.clock.join(from);
  }
  if (groups.size() > 1) merge_equal();
}

void WarpOrder::acquire(uint32_t mask, uint64_t own_cluster, const ClusterClocks& from) {
  if (from.empty()) return;
  split(mask);
  for (LaneGroup& group : groups) {
    if (group.mask & mask) group.clock.join(own_cluster, from);
  }
  if (groups.size() > 1) merge_equal();
}

void WarpOrder::synchronise_lanes(uint32_t mask) {
  Clock all(cluster->agents);
  release(mask, all);
  advance();
  acquire(mask, all);
}

void WarpOrder::fence(uint32_t mask, Scope scope, uint32_t rank) {
  if (!fences) fences = std::make_unique<FenceClocks>();
  exec::for_each_lane(mask, [&](int lane) {
    ClusterClocks& acquired = fences->acquired[lane];
    acquire(1u << lane, cluster->index, acquired);
    acquired.clear();
    Clock clock(cluster->agents);
    release(1u << lane, clock);
    fences->released[lane] = std::make_shared<const Release>(
        Release{normalised(scope), cluster->index, rank, clock.all(cluster->index)});
  });
  advance();
}

void WarpOrder::proxy_fence(uint32_t mask) {
  auto make_visible = [](ClusterClock& clock) {
    for (int agent = 0; agent < clock.agents(); ++agent) {
      uint32_t& fenced = clock.at(View::kFenced, agent);
      fenced = std::max(fenced, clock.at(View::kGeneric, agent));
    }
    const std::vector<PartialEntry> partial = clock.partial;
    for (PartialEntry entry : partial) {
      if (entry.view != View::kGeneric) continue;
      entry.view = View::kFenced;
      clock.see(entry);
    }
  };
  split(mask);
  for (LaneGroup& group : groups) {
    if (!(group.mask & mask)) continue;
    make_visible(group.clock.own);
    group.clock.own.see(
        {static_cast<uint16_t>(agent), View::kFenced, as_entry_lanes(group.mask), stamp});
    if (!group.clock.foreign) continue;
    auto foreign = std::make_shared<ClusterClocks>(*group.clock.foreign);
    for (auto& [index, clock] : *foreign) make_visible(clock);
    group.clock.foreign = std::move(foreign);
  }
  if (groups.size() > 1) merge_equal();
  advance();
}

void WarpOrder::see_async(uint32_t mask) {
  split(mask);
  for (LaneGroup& group : groups) {
    if (!(group.mask & mask)) continue;
    group.clock.own.see({static_cast<uint16_t>(agent), View::kAsync, ~0u, stamp});
  }
  if (groups.size() > 1) merge_equal();
  advance();
}

BarrierClock& ClusterOrder::mbarrier(uint32_t address) {
  const auto [found, is_new] = mbarriers.try_emplace(address);
  if (is_new) found->second = {Clock(agents), Clock(agents), {}, true};
  return found->second;
}

namespace {

void take(WarpOrder& order, uint32_t rank, uint32_t lanes, const exec::Access& access,
          const Location& location) {
  const uint64_t cluster = order.cluster->index;
  const std::byte* address = access.host[exec::first_lane(lanes)];
  const bool at_once = acquires(access.order);
  uint32_t fresh = 0;
  exec::for_each_lane(lanes, [&](int lane) {
    WarpOrder::Taken& taken = order.taken[lane];
    const bool same = taken.address == address && taken.version == location.version;
    if (same && taken.at_once >= at_once) return;
    fresh |= 1u << lane;
    taken = {address, location.version, at_once};
  });
  for (const Release& release : location.releases) {
    if (!fresh || !includes(release, cluster, rank)) continue;
    if (at_once) {
      order.acquire(fresh, cluster, release.clocks);
    } else {
      if (!order.fences) order.fences = std::make_unique<FenceClocks>();
      exec::for_each_lane(fresh,
                          [&](int lane) { join(order.fences->acquired[lane], release.clocks); });
    }
  }
}

void hand_over(WarpOrder& order, uint32_t rank, int lane, const exec::Access& access,
               ReleasesByAddress& locations) {
  const uint64_t cluster = order.cluster->index;
  Release release;
  if (releases(access.order)) {
    Clock clock(order.cluster->agents);
    order.release(1u << lane, clock);
    order.advance();
    release = {normalised(access.scope), cluster, rank, clock.all(cluster)};
  } else if (order.fences && order.fences->released[lane]) {
    release = *order.fences->released[lane];
    // The pattern reaches as far as the smaller of the two scopes.
    if (release.scope == Scope::kGpu) release.scope = normalised(access.scope);
    if (normalised(access.scope) == Scope::kCta) release.scope = Scope::kCta;
  } else {
    return;
  }
  Location& location = locations[access.host[lane]];
  ++location.version;
  add_release(location.releases, release);
}

}  // namespace

void strong_access(WarpOrder& order, uint32_t rank, uint32_t lanes, const exec::Access& access,
                   ReleasesByAddress& locations) {
  const auto found = locations.find(access.host[exec::first_lane(lanes)]);
  const bool reads = access.kind != AccessKind::kStore;
  if (found != locations.end()) {
    // A read-modify-write continues the release sequence it finds; a plain strong store begins
    // anew.
    if (reads) {
      take(order, rank, lanes, access, found->second);
    } else {
      found->second.releases.clear();
      ++found->second.version;
    }
  }
  if (access.kind == AccessKind::kLoad) return;
  exec::for_each_lane(lanes, [&](int lane) { hand_over(order, rank, lane, access, locations); });
}

}  // namespace gpu_emulator::check
