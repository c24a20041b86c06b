#pragma once

// Runs warps: one Worker a host thread, one cluster at a time (more when clusters wait for each
// other through global memory).

#include <cstdint>
#include <vector>

#include "cta.h"

namespace gpu_emulator::exec {

struct RangeCache {  // the last range of MemoryMap that an address hit
  uint64_t begin = 1, end = 0;
  bool writable = false;
};

struct PcCounters {  // of one instruction; see LineCounters
  uint64_t executed = 0;
  uint64_t wavefronts = 0, ideal_wavefronts = 0;
  uint64_t requests = 0, sectors = 0, ideal_sectors = 0;
  uint64_t bytes = 0;
};

struct Worker {
  LaunchState* launch = nullptr;
  RangeCache global;
  bool count = false;
  std::vector<std::vector<PcCounters>> counters;  // by function, by pc
  PcCounters* current = nullptr;                  // of the current fragment's function
};

// Runs every runnable fragment of the warp for at most `quantum` instructions each. Whether any
// instruction was executed.
bool run_warp(Warp& warp, uint64_t quantum);

// Control flow of the current fragment, for handlers.
void diverge(Warp& warp, uint32_t taken, uint32_t taken_pc, uint32_t other_pc, uint32_t reconverge);
void exit_lanes(Warp& warp, uint32_t mask);
void call(Warp& warp, uint32_t mask, const Function& callee, uint32_t return_pc);
void return_lanes(Warp& warp, uint32_t mask);

std::unique_ptr<Cluster> make_cluster(LaunchState& launch, Worker& worker, uint64_t index);
std::string describe_waits(const Cluster& cluster);  // of the deadlock report

}  // namespace gpu_emulator::exec
