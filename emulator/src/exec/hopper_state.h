#pragma once

// What sm_90 adds to the state of warps, CTAs and clusters. Made when first used.

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "bulk_copy.h"
#include "mbarrier.h"
#include "registers_in_flight.h"
#include "warp.h"
#include "wgmma.h"

namespace gpu_emulator::exec {

struct Cluster;

// A bulk copy that completes by a group wait of the thread that issued it.
struct BulkGroupCopy {
  std::shared_ptr<BulkCopy> copy;
  uint32_t group = 0;  // the thread's commit_groups before it
};

struct HopperWarpState {
  std::vector<BulkGroupCopy> bulk;                // in order of issue
  std::array<uint32_t, kWarpSize> bulk_groups{};  // commit_group executed, by lane
  // barrier.cluster: lanes that have arrived and not waited, and the generation they arrived in.
  uint32_t cluster_arrived = 0;
  std::array<uint64_t, kWarpSize> cluster_generation{};
  int registers = 0;        // a thread's, by setmaxnreg; 0 = as launched
  uint32_t setmaxnreg = 0;  // executed
  RegistersInFlight in_flight;
};

struct HopperCtaState {
  std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by offset
  std::vector<Warpgroup> warpgroups;
  int64_t register_pool = 0;                                // released by setmaxnreg.dec
  std::vector<std::vector<const Instruction*>> setmaxnreg;  // executed, by warpgroup
};

struct HopperClusterState {
  uint64_t generation = 0;  // of barrier.cluster
};

HopperWarpState& hopper(Warp& warp);
HopperCtaState& hopper(Cta& cta);
HopperClusterState& hopper(Cluster& cluster);

// To be called when lanes exit, before they leave Warp::live: what they must not leave behind, and
// what completes without them.
void hopper_exit(Warp& warp, uint32_t mask);

// To be called after lanes have left Warp::live: barrier.cluster does not wait for them
// (cluster_forms.cpp).
void hopper_exited(Warp& warp);

}  // namespace gpu_emulator::exec
