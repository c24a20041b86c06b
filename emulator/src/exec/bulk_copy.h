#pragma once

// Copies of the async proxy: bulk copies and tensor boxes (PTX 9.7.9.25.4 and 9.7.9.25.5), between
// global and shared memory. A copy is planned and checked when it is issued; it reads its source
// into a buffer and writes its destinations when it is complete, or at any time before.

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "../device/tensor_map.h"
#include "async.h"
#include "reduction.h"

namespace gpu_emulator::exec {

// Bytes that are contiguous in global memory and, but for the swizzle, in shared memory.
struct Segment {
  uint64_t global = 0;
  uint32_t linear = 0;  // offset in the box
  uint32_t bytes = 0;
};

// The parts of the box at `coordinates` that lie inside the tensor, in order of the box.
std::vector<Segment> box_segments(const TensorMap& map, const int32_t* coordinates);

// What a box holds outside the tensor: bytes of one element, repeated.
std::vector<std::byte> fill_pattern(const TensorMap& map);

// Copies bytes [linear, linear + bytes) of a box between `box`, which is linear, and the swizzled
// image in shared memory that begins at address (host: its first byte).
void to_swizzled(const std::byte* box, uint32_t bytes, uint32_t address, uint32_t width,
                 std::byte* host);
void from_swizzled(std::byte* box, uint32_t bytes, uint32_t address, uint32_t width,
                   const std::byte* host);

struct BulkCopy {
  IssueSite site;
  Proxy proxy = Proxy::kAsync;
  BulkDirection direction = BulkDirection::kGlobalToShared;
  uint32_t bytes = 0;             // in shared memory
  std::vector<Segment> segments;  // in global memory
  uint64_t source = 0;            // shared address, where the source is shared memory
  // Shared addresses of the destinations, and of the mbarrier that each completes.
  std::vector<uint64_t> destinations, mbarriers;
  uint32_t swizzle = 0;           // width in bytes
  std::vector<std::byte> fill;    // of what the segments do not cover
  bool flush_subnormals = false;  // of fp32, tensor maps' FTZ types
  std::optional<Reduction> reduction;

  std::vector<AsyncRanges> loads, stores;      // made when it is issued
  std::vector<std::byte> box;                  // linear; of kRegistersToShared filled when issued
  std::vector<std::byte> undefined;            // as Access::undefined, of the bytes of `box`
  bool was_read = false, was_written = false;  // the bytes were moved
  bool reads_complete = false;                 // by the rules of PTX
};

// Resolves and checks every range, shows them as issued, and hands the copy to the cluster, or to
// the thread's current bulk async-group.
void issue_to_mbarriers(std::shared_ptr<BulkCopy> copy, const char* what);
void issue_to_group(std::shared_ptr<BulkCopy> copy);

// What a group wait does: the source's part, then the rest.
void complete_reads(BulkCopy& copy);
void complete_writes(BulkCopy& copy);

}  // namespace gpu_emulator::exec
