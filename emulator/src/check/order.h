#pragma once

// Who has seen what: clocks of the lanes of each warp, moved by the synchronising operations of the
// PTX memory model (PTX ISA 8.8 release and acquire patterns, 8.9.4 memory synchronization).
//
//   bar, barrier (9.7.13.1), barrier.cluster (9.7.13.4)   arrivals release, waits acquire
//   bar.warp.sync (9.7.13.2)                              orders the lanes of its mask
//   mbarrier (9.7.13.15)                                  arrivals release, successful waits
//   acquire fence, membar (9.7.13.5) with strong accesses         release and acquire patterns
//   fence.proxy.async                                     generic accesses seen so far become
//                                                         visible to the async proxy
// shfl, vote, match, redux, elect, mma and ldmatrix have .sync for convergence only: none of them
// orders memory.

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../exec/cta.h"
#include "../exec/observer.h"
#include "clock.h"
#include "record.h"

namespace gpu_emulator::check {

// What a strong write left at an address for those who read it.
struct Release {
  exec::Scope scope;
  uint64_t cluster;  // of kCta and kCluster
  uint32_t rank;     // of kCta
  ClusterClocks clocks;
};
struct Location {
  std::vector<Release> releases;
  uint64_t version = 0;  // counts changes
};
using ReleasesByAddress = std::unordered_map<const std::byte*, Location>;

struct BarrierClock {  // of a cluster barrier, an mbarrier
  Clock pending;       // of the arrivals of the phase under way
  Clock released;      // of complete phases
  // Of an mbarrier: its init, until a fence has made it visible to the async proxy.
  PartialEntry init{};
  bool init_is_fenced = false;
};

struct CtaBarrierClock {
  Clock pending;                  // of the arrivals of the phase under way
  std::vector<uint32_t> arrived;  // agents, in the phase under way
  // By agent, of the phase that it last arrived in and that is complete: others may complete the
  // next one before it goes on.
  std::unordered_map<uint32_t, std::shared_ptr<const Clock>> released;
};

struct LaneGroup {  // lanes with one clock
  uint32_t mask;
  Clock clock;
};

struct FenceClocks {
  std::array<std::shared_ptr<const Release>, 32> released;  // at the lane's last fence
  std::array<ClusterClocks, 32> acquired;  // by strong reads, in force after the lane's next fence
};

struct ClusterOrder;

// Moments (Record::moment()) of accesses found to have happened before, the last ones: they stay
// so, as clocks only grow.
class KnownMoments {
 public:
  bool has(Record record) const { return moments_[place(record)] == record.moment(); }
  void add(Record record) { moments_[place(record)] = record.moment(); }

 private:
  static constexpr uint32_t kPlaces = 64;
  static uint32_t place(Record record) { return (record.agent() + 8 * record.stamp()) % kPlaces; }
  std::array<uint64_t, kPlaces> moments_{};
};

struct WarpOrder {
  ClusterOrder* cluster = nullptr;
  uint32_t agent = 0;
  uint32_t stamp = 1;
  uint32_t lanes = 0;  // that the warp has had from the beginning
  std::vector<LaneGroup> groups;
  KnownMoments known;  // before all lanes of groups[0], within the cluster
  std::unique_ptr<FenceClocks> fences;
  // By lane: what its last strong read took, so that a lane that spins takes it once.
  struct Taken {
    const std::byte* address = nullptr;
    uint64_t version = 0;
    bool at_once = false;  // by an acquire, not by a relaxed read and a fence to come
  };
  std::array<Taken, 32> taken{};

  const Clock& clock_of(int lane) const;
  // The clock of all lanes of mask, null where they differ.
  const Clock* common_clock(uint32_t mask) const {
    return groups.size() == 1 || !(mask & ~groups[0].mask) ? &groups[0].clock : nullptr;
  }
  void advance();

  void release(uint32_t mask, Clock& into) const;
  void acquire(uint32_t mask, const Clock& from);
  void acquire(uint32_t mask, uint64_t own_cluster, const ClusterClocks& from);
  void synchronise_lanes(uint32_t mask);
  void fence(uint32_t mask, exec::Scope scope, uint32_t rank);
  void proxy_fence(uint32_t mask);
  void see_async(uint32_t mask);  // this warp's own asynchronous operations so far are complete

 private:
  void split(uint32_t mask);
  void merge_equal();
  uint32_t as_entry_lanes(uint32_t mask) const { return mask == lanes ? ~0u : mask; }
};

struct CtaOrder {
  std::array<CtaBarrierClock, 16> barriers;
};

struct ClusterOrder {
  uint64_t index = 0;
  int agents = 0;
  std::vector<CtaOrder> ctas;
  BarrierClock barrier;
  std::unordered_map<uint32_t, BarrierClock> mbarriers;  // by shared address
  ReleasesByAddress shared_releases;

  BarrierClock& mbarrier(uint32_t address);
};

// Release and acquire through global memory; of a launch, for all host threads.
class LaunchReleases {
 public:
  template <class F>
  void with(F&& f) {
    std::lock_guard lock(mutex_);
    f(releases_);
  }

 private:
  std::mutex mutex_;
  ReleasesByAddress releases_;
};

// A strong access of lanes of one warp to one address (PTX ISA 8.8): what they take and hand over.
void strong_access(WarpOrder& order, uint32_t rank, uint32_t lanes, const exec::Access& access,
                   ReleasesByAddress& locations);

}  // namespace gpu_emulator::check
