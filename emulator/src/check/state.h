#pragma once

// What the checks keep of each warp, CTA and cluster: exec's `observed` pointers.

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../device/defined_bytes.h"
#include "order.h"
#include "readers.h"
#include "shadow.h"

namespace gpu_emulator::check {

using SharedShadow = Shadow<SharedReaders>;
using GlobalShadow = Shadow<GlobalReaders>;

struct WarpState {
  WarpOrder order;
  std::string origin;  // of the first undefined value that it read: the end of a sentence
  const exec::Function* function = nullptr;  // the current one,
  const uint64_t* places = nullptr;          // and the places of its instructions' registers
  uint64_t undefined_places = 0;      // place_of() of words of Frame::undefined that may not be 0
  std::array<uint64_t, 32> copied{};  // by lane: bytes undefined in the source of a cp.async
  // Local memory: whether each byte has been written; lane-major, local_capacity bytes a lane.
  std::vector<bool> local_defined;
  uint32_t local_capacity = 0;
  // The last ranges of device memory that it accessed.
  struct KnownRange {
    uint64_t begin = 1, end = 0;
    DefinedBytes* defined = nullptr;  // null: all of it
  };
  std::array<KnownRange, 4> ranges;
  size_t next_range = 0;
  // Strong reads of global memory whose value another host thread may have changed between the
  // check and the read.
  struct StrongRead {
    exec::Access access;
    uint64_t address;
    std::byte* host;
    int lane;
  };
  std::vector<StrongRead> to_repeat;
};

struct ClusterState {
  ClusterOrder order;
  std::vector<std::unique_ptr<SharedShadow>> shared;  // by rank
  std::vector<std::unique_ptr<WarpState>> warps;      // by agent
  // The first undefined value written to global memory. Reported when the cluster ends, so that a
  // race that is its cause comes first.
  std::optional<exec::Failure> undefined_output;
  // Where an asynchronous copy first read an undefined value: a sentence.
  std::string undefined_copy;
};

// Registers in 64 places: a bit for the unit of 64 bytes, which neighbours share.
inline uint64_t place_of(uint32_t unit) { return uint64_t{1} << unit / 8 % 64; }

inline WarpState& state_of(const exec::Warp& warp) {
  return *static_cast<WarpState*>(warp.observed);
}
inline ClusterState& state_of(const exec::Cluster& cluster) {
  return *static_cast<ClusterState*>(cluster.observed);
}

}  // namespace gpu_emulator::check
