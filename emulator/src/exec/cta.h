#pragma once

// State of a CTA and of the cluster it belongs to. A cluster (one CTA without clusters) is the unit
// of scheduling: one host thread runs all its warps by turns.

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "../device/device.h"
#include "observer.h"
#include "warp.h"

namespace gpu_emulator::exec {

struct LaunchState;
struct HopperCtaState;      // hopper_state.h: mbarriers, warpgroups
struct HopperClusterState;  // hopper_state.h: barrier.cluster

// Shared addresses: CTA rank in the cluster << 24 | offset; offsets begin here, so that a null
// pointer is out of bounds, and as on hardware since sm_80, where the driver keeps 1 KiB.
inline constexpr uint32_t kSharedBase = 1024;
inline constexpr uint32_t kSharedRankShift = 24;
inline constexpr uint32_t kSharedOffsetMask = (1u << kSharedRankShift) - 1;

// barrier.cta 0..15 (PTX 9.7.13.1). A warp arrives when all its lanes that have not exited have
// come, and counts as 32 threads. With a thread count it may arrive as often as it likes: a phase
// ends when that many threads have arrived.
struct NamedBarrier {
  static constexpr int kMaxWarps = 32;  // of a CTA

  struct Phase {
    uint32_t expected = 0;   // threads; all warps name the same number
    uint32_t threads = 0;    // that have arrived
    bool whole_cta = false;  // a warp named no number: each warp must arrive
    bool repeats = false;    // a warp has arrived more than once
    bool reduces = false;    // barrier.red
    Votes votes;
    std::array<uint32_t, kMaxWarps> arrivals{};  // by warp
  };
  struct Coming {  // lanes of a warp that wait for the others of the warp
    uint32_t lanes = 0;
    Votes votes;
  };

  Phase phase;
  uint64_t generation = 0;                              // phases that have ended
  std::array<uint32_t, kMaxWarps> previous_arrivals{};  // in the phase before
  std::array<Coming, kMaxWarps> coming;
};

struct Cta {
  struct Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in the cluster
  std::array<uint32_t, 3> id{};
  std::array<uint32_t, 3> rank_xyz{};
  AlignedBytes shared;
  uint32_t shared_bytes = 0;
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<NamedBarrier, 16> barriers;
  std::shared_ptr<HopperCtaState> hopper;
  void* observed = nullptr;  // the observer's own state

  uint32_t live_threads() const;
};

// An operation that completes on its own, not by a group wait of its warp: TMA and bulk copies that
// signal an mbarrier. Late mode completes one only when no warp of the cluster can go on.
struct AsyncOperation {
  std::function<void()> complete;
  // Called instead when all threads of the cluster have exited. Absent: complete.
  std::function<void()> abandon;
  std::string what;  // for reports: "cp.async.bulk.tensor at PTX line 12"
};

struct Cluster {
  LaunchState* launch = nullptr;
  uint64_t index = 0;
  std::array<uint32_t, 3> id{};
  std::vector<std::unique_ptr<Cta>> ctas;
  std::deque<AsyncOperation> pending;
  std::shared_ptr<HopperClusterState> hopper;
  void* observed = nullptr;    // the observer's own state
  uint32_t expired_waits = 0;  // Wait::expired, since an mbarrier's phase ended
  std::mt19937_64 random;      // of this cluster: seeded by Options::seed and index
  bool done = false;

  // Runs it now, or keeps it for the scheduler: see defers() in async.h.
  void submit(AsyncOperation operation);
};

// What all threads of one launch share; constant while it runs but for the observer's own state.
struct LaunchState {
  const Arch* arch = nullptr;
  const Options* options = nullptr;
  const MemoryMap* memory = nullptr;
  const Launch* launch = nullptr;
  const Function* entry = nullptr;
  Observer* observer = nullptr;  // null: no checks
  std::array<uint32_t, 3> cluster_shape{1, 1, 1};
  uint32_t shared_bytes = 0;        // a CTA's, static and dynamic
  mutable std::mutex wide_atomics;  // held by 128-bit atomic operations, which few hosts have
};

inline const LaunchState& launch_of(const Warp& warp) { return *warp.cta->cluster->launch; }
inline Observer* observer_of(const Warp& warp) { return warp.cta->cluster->launch->observer; }

// The CTA of the warp's cluster that a shared address names; fails for a rank outside it.
Cta& shared_owner(const Warp& warp, int lane, uint32_t address);

}  // namespace gpu_emulator::exec
