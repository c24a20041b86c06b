#pragma once

// The observer of a launch with checks: what checker.h makes. Accesses go to shadow memory and to
// the definedness of values (checker.cpp), synchronisation to the clocks (synchronisation.cpp); the
// sentences of reports are in reporter.cpp.

#include <memory>
#include <mutex>
#include <unordered_map>

#include "../exec/observer.h"
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

inline const char* name_of(Space space) {
  return space == Space::kShared ? "shared" : space == Space::kLocal ? "local" : "global";
}

class Checker final : public exec::Observer, private Reporter {
 public:
  explicit Checker(const exec::LaunchState& launch)
      : launch_(launch),
        sites_(launch),
        values_(*launch.launch->program),
        checks_(launch.options->checks),
        order_accesses_(checks_.order_accesses()),
        follow_values_(checks_.follow_values()),
        memory_may_be_undefined_(follow_values_ && launch.memory->holds_undefined()) {}

  void cluster_begins(exec::Cluster& cluster) override;
  void cluster_ends(exec::Cluster& cluster) override;
  void access(Warp& warp, const Access& access) override;
  void async_begins(Warp& warp, const Access& access) override;
  void synchronise(Warp& warp, const SyncEvent& event) override;
  void wgmma_completes(Warp& warp, const exec::WgmmaOperation& operation) override;
  bool is_undefined(const Warp& warp, exec::Slot slot, int lane) const override {
    return follow_values_ && Values::is_undefined(warp, slot, lane);
  }
  void execute(Warp& warp, const exec::Instruction& in, uint32_t mask) override {
    if (follow_values_) values_.execute(warp, in, mask);
  }

 private:
  std::unique_ptr<SharedShadow> make_shadow(const exec::Cta& cta);
  Actor actor_of(Warp& warp, const Access& access) const;
  void access_shared(Warp& warp, const Access& access);
  void access_global(Warp& warp, const Access& access);
  void access_local(Warp& warp, const Access& access);
  void read_global_cells(const Actor& actor, const Access& access);
  uint64_t access_shared_lane(const Actor& actor, const Access& access, int lane);
  void complete_shared(const Actor& actor, const Access& access, int lane, size_t first);
  void follow_global(Warp& warp, const Access& access);
  void follow_global_lane(Warp& warp, const Access& access, int lane);
  void complete_global(Warp& warp, const Access& access, int lane, size_t first);
  DefinedBytes* definedness(Warp& warp, uint64_t address) const;
  void strong(Warp& warp, const Access& access);
  void repeat_strong_reads(Warp& warp);
  void found_undefined(Warp& warp, const Access& access, int lane, uint64_t undefined);
  void require_defined(Warp& warp, const Access& access, int lane, uint64_t undefined);
  void combined_undefined(Warp& warp, const Access& access, int lane);
  void barrier(Warp& warp, const SyncEvent& event);
  void mbarrier(Warp& warp, const SyncEvent& event);
  void require_fenced_init(Warp& warp, const SyncEvent& event, BarrierClock& barrier);
  void cluster_barrier(Warp& warp, const SyncEvent& event);
  void arrive(Warp& warp, const SyncEvent& event, Clock& pending);
  void fence_inits(Warp& warp, uint32_t mask);

  void conflict(const Actor& actor, int lane, const Previous& previous,
                const Place& place) override;
  void missing_fence(const Actor& actor, int lane, const Previous& previous,
                     const Place& place) override;
  bool same_value(const Actor& actor, int lane, int other) override;
  std::string describe(const Previous& previous) const;

  const exec::LaunchState& launch_;
  Sites sites_;
  Values values_;
  exec::Checks checks_;
  bool order_accesses_, follow_values_;
  bool memory_may_be_undefined_;  // of the device, before the launch
  GlobalMemory global_;
  LaunchReleases releases_;
  std::mutex clusters_mutex_;  // of the next two
  std::vector<std::unique_ptr<SharedShadow>> free_shadows_;
  std::unordered_map<const exec::Cluster*, std::unique_ptr<ClusterState>> clusters_;
};

}  // namespace gpu_emulator::check
