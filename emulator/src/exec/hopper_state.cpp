#include "hopper_state.h"

#include "async.h"
#include "cta.h"
#include "report.h"

namespace gpu_emulator::exec {

HopperWarpState& hopper(Warp& warp) {
  if (!warp.hopper) warp.hopper = std::make_shared<HopperWarpState>();
  return *warp.hopper;
}

HopperClusterState& hopper(Cluster& cluster) {
  if (!cluster.hopper) cluster.hopper = std::make_shared<HopperClusterState>();
  return *cluster.hopper;
}

HopperCtaState& hopper(Cta& cta) {
  if (!cta.hopper) {
    cta.hopper = std::make_shared<HopperCtaState>();
    cta.hopper->setmaxnreg.resize(cta.warps.size() / kWarpgroupWarps + 1);
  }
  return *cta.hopper;
}

void hopper_exit(Warp& warp, uint32_t mask) {
  if (!warp.hopper) return;
  HopperWarpState& state = *warp.hopper;
  std::erase_if(state.bulk, [&](BulkGroupCopy& entry) {
    const BulkCopy& copy = *entry.copy;
    if (!(mask >> copy.site.lane & 1)) return false;
    at_site(copy.site, [&] {
      if (!copy.reads_complete && reports(warp, ReportKind::kBulkWait)) {
        fail(warp, copy.site.lane, ReportKind::kBulkWait,
             "The thread exited before cp.async.bulk.wait_group for this copy, which reads shared "
             "memory.");
      }
      complete_reads(*entry.copy);
      complete_writes(*entry.copy);
    });
    return true;
  });
  if (mask == warp.live && !state.in_flight.empty()) {
    fail(warp, -1, ReportKind::kWgmmaWait, "The warp exited before wgmma.wait_group.");
  }
}

}  // namespace gpu_emulator::exec
