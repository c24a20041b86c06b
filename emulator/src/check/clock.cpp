#include "clock.h"

#include <algorithm>

namespace gpu_emulator::check {

bool ClusterClock::knows(View view, int agent, uint32_t lanes, uint32_t stamp) const {
  for (const PartialEntry& entry : partial) {
    if (entry.agent == agent && entry.view == view && entry.stamp >= stamp) lanes &= ~entry.lanes;
  }
  return lanes == 0;
}

void ClusterClock::see(const PartialEntry& entry) {
  if (at(entry.view, entry.agent) >= entry.stamp) return;
  for (PartialEntry& known : partial) {
    if (known.agent != entry.agent || known.view != entry.view) continue;
    if (known.stamp >= entry.stamp && !(entry.lanes & ~known.lanes)) return;
    if (known.stamp <= entry.stamp) known.lanes &= ~entry.lanes;
  }
  std::erase_if(partial, [](const PartialEntry& known) { return known.lanes == 0; });
  if (entry.lanes == ~0u) {
    at(entry.view, entry.agent) = entry.stamp;
  } else {
    partial.push_back(entry);
  }
}

void ClusterClock::join(const ClusterClock& other) {
  if (stamps.size() < other.stamps.size()) stamps.resize(other.stamps.size());
  for (size_t i = 0; i < other.stamps.size(); ++i) {
    stamps[i] = std::max(stamps[i], other.stamps[i]);
  }
  for (const PartialEntry& entry : other.partial) see(entry);
  if (partial.empty()) return;
  std::erase_if(partial, [&](const PartialEntry& e) { return at(e.view, e.agent) >= e.stamp; });
}

void join(ClusterClocks& into, const ClusterClocks& other) {
  for (const auto& [cluster, clock] : other) into[cluster].join(clock);
}

void Clock::join(const Clock& other) {
  own.join(other.own);
  if (!other.foreign || other.foreign == foreign) return;
  if (!foreign) {
    foreign = other.foreign;
    return;
  }
  auto both = std::make_shared<ClusterClocks>(*foreign);
  check::join(*both, *other.foreign);
  foreign = std::move(both);
}

void Clock::join(uint64_t own_cluster, const ClusterClocks& clocks) {
  auto both = std::make_shared<ClusterClocks>(foreign ? *foreign : ClusterClocks());
  bool has_foreign = false;
  for (const auto& [cluster, clock] : clocks) {
    if (cluster == own_cluster) {
      own.join(clock);
    } else {
      (*both)[cluster].join(clock);
      has_foreign = true;
    }
  }
  if (has_foreign) foreign = std::move(both);
}

ClusterClocks Clock::all(uint64_t own_cluster) const {
  ClusterClocks clocks = foreign ? *foreign : ClusterClocks();
  clocks[own_cluster].join(own);
  return clocks;
}

bool Clock::operator==(const Clock& other) const {
  return own.stamps == other.own.stamps && own.partial == other.own.partial &&
         foreign == other.foreign;
}

}  // namespace gpu_emulator::check
