#pragma once

// Runs warps: one Worker a host thread, one cluster at a time (more when clusters wait for each
// other through global memory).

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cta.h"

namespace gpu_emulator::exec {

// The last ranges of MemoryMap that addresses hit.
struct RangeCache {
  struct Range {
    uint64_t begin = 1, end = 0;
    bool writable = false;
  };
  std::array<Range, 8> ranges;
  uint32_t oldest = 0;

  const Range* find(uint64_t address) const {
    for (const Range& range : ranges) {
      if (address >= range.begin && address < range.end) return &range;
    }
    return nullptr;
  }
  void add(const Range& range) { ranges[oldest++ % ranges.size()] = range; }
};

struct Worker {
  LaunchState* launch = nullptr;
  RangeCache global;
  bool count = false;
  // By function, by pc; empty without counting.
  std::vector<std::vector<InstructionCounters>> counters;
  InstructionCounters* current = nullptr;  // of the current fragment's function
  std::vector<std::pair<size_t, AlignedBytes>> free_registers;  // of finished frames, by size
};

// Runs every runnable fragment of the warp for about `quantum` instructions each. Whether any
// instruction was executed.
bool run_warp(Warp& warp, uint64_t quantum);

// ---------------------------------------------------------------------- control flow, for handlers
// Each changes the current fragment; the handler returns Step::kJump after it.

void diverge(Warp& warp, uint32_t taken, uint32_t taken_pc, uint32_t other_pc, uint32_t reconverge);
void exit_lanes(Warp& warp, uint32_t mask);  // the others go on behind the instruction
void call_function(Warp& warp, uint32_t mask, const Function& callee, uint32_t return_pc);
void return_lanes(Warp& warp, uint32_t mask);

// Collective of the lanes of `member` that are alive. When all of them have come to it, true:
// *mask becomes all of them, and other fragments that waited at the same instruction are moved
// behind it. Otherwise false, and the handler returns Step::kRetry.
bool gather(Warp& warp, uint32_t member, uint32_t* mask, const char* what);

// Behind bar.warp.sync of all lanes of an entry: those that came in several fragments are one
// again, whatever they have waited for before. True: they were, and the handler returns
// Step::kJump.
bool reconverge(Warp& warp, uint32_t mask);

// For .aligned barriers: all live lanes come together, but for a warp that was released.
void require_aligned(const Warp& warp, uint32_t mask, const char* what);

// For instructions whose lanes may wait on their own: lanes of the fragment that its guard leaves
// out wait behind the instruction, and go on where nothing else can. True: the fragment was split,
// and the handler returns Step::kJump.
bool split_off(Warp& warp, uint32_t mask);

// Lanes that wait for others at a reconvergence point go on without them, where a warp is stuck:
// independent thread scheduling promises that. Whether there were any.
bool release_joining(Warp& warp);

// ---------------------------------------------------------------------------------------- clusters

std::unique_ptr<Cluster> make_cluster(LaunchState& launch, Worker& worker, uint64_t index);
int new_frame(Warp& warp, const Function& function, uint32_t local_base);
void free_frame(Warp& warp, int frame);

// One turn of every warp. Whether any made progress; asynchronous operations count.
bool run_cluster(Cluster& cluster, Worker& worker);

// Completes the warp's cp.async of the lanes of mask but for each lane's `keep` newest groups;
// also those of no group yet, where `ungrouped` (copy_forms.cpp).
void complete_copies(Warp& warp, uint32_t mask, uint32_t keep, bool ungrouped = true);

std::string describe_waits(const Cluster& cluster);  // of the deadlock report

}  // namespace gpu_emulator::exec
