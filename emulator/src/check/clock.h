#pragma once

// Vector clocks of a launch: who has seen whose memory accesses (happens-before, which the PTX
// memory model calls causality order, PTX ISA 8.9.5).
//
// An agent is a warp of the cluster: rank in the cluster * warps of a CTA + warp. Its stamp counts
// the moments at which it told others about its accesses; every access carries the stamp of its
// warp and its lane. A clock says for each agent up to which stamp its accesses have been seen:
//   kGeneric  accesses of the lanes themselves, by the generic proxy
//   kAsync    operations of the async proxy that the warp issued (TMA, bulk copies, wgmma)
//   kFenced   generic accesses that a proxy fence has made visible to the async proxy
// An entry counts for all lanes of an agent. What is known of some lanes only stands in `partial`.

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace gpu_emulator::check {

enum class View : uint8_t { kGeneric, kAsync, kFenced };
inline constexpr int kViews = 3;

struct PartialEntry {  // lanes of one agent seen further than the agent's entry
  uint16_t agent;
  View view;
  uint32_t lanes;
  uint32_t stamp;
  bool operator==(const PartialEntry&) const = default;
};

// What is known of the agents of one cluster.
struct ClusterClock {
  std::vector<uint32_t> stamps;  // [view][agent]
  std::vector<PartialEntry> partial;

  explicit ClusterClock(int agents = 0) : stamps(static_cast<size_t>(kViews) * agents) {}
  int agents() const { return static_cast<int>(stamps.size() / kViews); }
  uint32_t& at(View view, int agent) { return stamps[static_cast<int>(view) * agents() + agent]; }
  uint32_t at(View view, int agent) const {
    return stamps[static_cast<int>(view) * agents() + agent];
  }
  bool has_seen(View view, int agent, uint32_t lanes, uint32_t stamp) const {
    return at(view, agent) >= stamp || (!partial.empty() && knows(view, agent, lanes, stamp));
  }
  void join(const ClusterClock& other);
  void see(const PartialEntry& entry);

 private:
  bool knows(View view, int agent, uint32_t lanes, uint32_t stamp) const;
};

using ClusterClocks = std::map<uint64_t, ClusterClock>;  // by index of the cluster

struct Clock {
  ClusterClock own;
  std::shared_ptr<const ClusterClocks> foreign;  // null: nothing known of other clusters

  explicit Clock(int agents = 0) : own(agents) {}
  void join(const Clock& other);
  void join(uint64_t own_cluster, const ClusterClocks& clocks);
  ClusterClocks all(uint64_t own_cluster) const;
  bool operator==(const Clock& other) const;
};

void join(ClusterClocks& into, const ClusterClocks& other);

}  // namespace gpu_emulator::check
