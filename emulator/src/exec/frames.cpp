// Frames: registers and local memory of an activation, and the values they begin with.

#include <cstring>
#include <new>
#include <unordered_map>

#include "function_decoder.h"
#include "memory.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

constexpr size_t kMaxFrames = 4096;
constexpr uint32_t kMaxLocalBytes = 512 * 1024;  // a thread's, as on hardware

using LaneValue = uint64_t (*)(const Warp&, int lane);

uint32_t thread_of(const Warp& warp, int lane) { return warp.id * kWarpSize + lane; }
const std::array<uint32_t, 3>& block_of(const Warp& warp) { return launch_of(warp).launch->block; }
const std::array<uint32_t, 3>& grid_of(const Warp& warp) { return launch_of(warp).launch->grid; }

template <int kAxis>
uint64_t thread_index(const Warp& warp, int lane) {
  const auto& block = block_of(warp);
  const uint32_t thread = thread_of(warp, lane);
  if (kAxis == 0) return thread % block[0];
  if (kAxis == 1) return thread / block[0] % block[1];
  return thread / block[0] / block[1];
}
template <int kAxis>
uint64_t block_size(const Warp& warp, int) {
  return block_of(warp)[kAxis];
}
template <int kAxis>
uint64_t cta_index(const Warp& warp, int) {
  return warp.cta->id[kAxis];
}
template <int kAxis>
uint64_t grid_size(const Warp& warp, int) {
  return grid_of(warp)[kAxis];
}
template <int kAxis>
uint64_t cluster_index(const Warp& warp, int) {
  return warp.cta->cluster->id[kAxis];
}
template <int kAxis>
uint64_t cluster_count(const Warp& warp, int) {
  return grid_of(warp)[kAxis] / launch_of(warp).cluster_shape[kAxis];
}
template <int kAxis>
uint64_t rank_in_cluster(const Warp& warp, int) {
  return warp.cta->rank_xyz[kAxis];
}
template <int kAxis>
uint64_t cluster_size(const Warp& warp, int) {
  return launch_of(warp).cluster_shape[kAxis];
}

const std::unordered_map<std::string, LaneValue>& special_registers() {
  static const std::unordered_map<std::string, LaneValue> table = {
      {"%tid.x", thread_index<0>},
      {"%tid.y", thread_index<1>},
      {"%tid.z", thread_index<2>},
      {"%ntid.x", block_size<0>},
      {"%ntid.y", block_size<1>},
      {"%ntid.z", block_size<2>},
      {"%ctaid.x", cta_index<0>},
      {"%ctaid.y", cta_index<1>},
      {"%ctaid.z", cta_index<2>},
      {"%nctaid.x", grid_size<0>},
      {"%nctaid.y", grid_size<1>},
      {"%nctaid.z", grid_size<2>},
      {"%clusterid.x", cluster_index<0>},
      {"%clusterid.y", cluster_index<1>},
      {"%clusterid.z", cluster_index<2>},
      {"%nclusterid.x", cluster_count<0>},
      {"%nclusterid.y", cluster_count<1>},
      {"%nclusterid.z", cluster_count<2>},
      {"%cluster_ctaid.x", rank_in_cluster<0>},
      {"%cluster_ctaid.y", rank_in_cluster<1>},
      {"%cluster_ctaid.z", rank_in_cluster<2>},
      {"%cluster_nctaid.x", cluster_size<0>},
      {"%cluster_nctaid.y", cluster_size<1>},
      {"%cluster_nctaid.z", cluster_size<2>},
      {"%cluster_ctarank", [](const Warp& w, int) -> uint64_t { return w.cta->rank; }},
      {"%cluster_nctarank",
       [](const Warp& w, int) -> uint64_t { return w.cta->cluster->ctas.size(); }},
      {"%is_explicit_cluster",
       [](const Warp& w, int) -> uint64_t { return launch_of(w).entry->explicit_cluster; }},
      {"%laneid", [](const Warp&, int lane) -> uint64_t { return lane; }},
      {"%warpid", [](const Warp& w, int) -> uint64_t { return w.id; }},
      {"%nwarpid",
       [](const Warp& w, int) -> uint64_t { return launch_of(w).arch->max_threads_per_sm / 32; }},
      {"%smid",
       [](const Warp& w, int) -> uint64_t {
         return w.cta->cluster->index % launch_of(w).arch->sm_count;
       }},
      {"%nsmid", [](const Warp& w, int) -> uint64_t { return launch_of(w).arch->sm_count; }},
      {"%gridid", [](const Warp&, int) -> uint64_t { return 1; }},
      {"%lanemask_eq", [](const Warp&, int lane) -> uint64_t { return 1u << lane; }},
      {"%lanemask_lt", [](const Warp&, int lane) -> uint64_t { return (1u << lane) - 1; }},
      {"%lanemask_le", [](const Warp&, int lane) -> uint64_t { return (2u << lane) - 1; }},
      {"%lanemask_gt", [](const Warp&, int lane) -> uint64_t { return ~((2u << lane) - 1); }},
      {"%lanemask_ge", [](const Warp&, int lane) -> uint64_t { return ~((1u << lane) - 1); }},
      {"%dynamic_smem_size",
       [](const Warp& w, int) -> uint64_t { return launch_of(w).launch->dynamic_shared_bytes; }},
      {"%total_smem_size",
       [](const Warp& w, int) -> uint64_t {
         return launch_of(w).shared_bytes + launch_of(w).arch->reserved_shared_per_block;
       }},
      {"%aggr_smem_size",
       [](const Warp& w, int) -> uint64_t {
         return launch_of(w).shared_bytes + launch_of(w).arch->reserved_shared_per_block;
       }},
      {"%reserved_smem_offset_begin", [](const Warp&, int) -> uint64_t { return 0; }},
      {"%reserved_smem_offset_end", [](const Warp&, int) -> uint64_t { return kSharedBase; }},
      {"%carry", [](const Warp&, int) -> uint64_t { return 0; }},
      {"%returned", [](const Warp&, int) -> uint64_t { return 0; }},
  };
  return table;
}

uint64_t frame_value(const Warp& warp, const FrameValue& value, uint32_t local_base, int lane) {
  const LaunchState& launch = launch_of(warp);
  switch (value.kind) {
    case FrameValue::Kind::kSpecial:
      return special_registers().at(value.special)(warp, lane);
    case FrameValue::Kind::kShared:
      return (uint64_t{warp.cta->rank} << kSharedRankShift | kSharedBase) +
             launch.entry->shared_offsets[value.variable] + value.offset;
    case FrameValue::Kind::kModule:
      return launch.launch->module_base + value.offset;
    case FrameValue::Kind::kLocal:
      return kLocalBase + local_base + value.offset;
  }
  return 0;
}

void fill_frame_values(Warp& warp, Frame& frame) {
  for (const FrameValue& value : frame.function->frame_values) {
    std::byte* slot = frame.registers.get() + value.slot;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const uint64_t bits = frame_value(warp, value, frame.local_base, lane);
      if (value.wide) {
        std::memcpy(slot + 8 * lane, &bits, 8);
      } else {
        std::memcpy(slot + 4 * lane, &bits, 4);
      }
    }
  }
}

AlignedBytes take_registers(Worker& worker, size_t bytes) {
  for (auto& [size, block] : worker.free_registers) {
    if (size != bytes) continue;
    AlignedBytes found = std::move(block);
    std::swap(size, worker.free_registers.back().first);
    std::swap(block, worker.free_registers.back().second);
    worker.free_registers.pop_back();
    return found;
  }
  return allocate_aligned(bytes);
}

void grow_local(Warp& warp, uint32_t bytes) {
  if (bytes <= warp.local_capacity) return;
  const uint32_t capacity = std::max(bytes, warp.local_capacity * 2);
  auto grown = std::make_unique<std::byte[]>(size_t{capacity} * kWarpSize);
  std::memset(grown.get(), kPoison, size_t{capacity} * kWarpSize);
  for (int lane = 0; lane < kWarpSize && warp.local; ++lane) {
    std::memcpy(grown.get() + size_t{capacity} * lane, warp.local_memory(lane),
                warp.local_capacity);
  }
  warp.local = std::move(grown);
  warp.local_capacity = capacity;
}

}  // namespace

bool has_special_register(const std::string& name) { return special_registers().count(name) > 0; }

AlignedBytes allocate_aligned(size_t bytes) {
  return AlignedBytes(new (std::align_val_t{64}) std::byte[bytes]);
}

int new_frame(Warp& warp, const Function& function, uint32_t local_base) {
  size_t index = 0;
  while (index < warp.frames.size() && warp.frames[index].function) ++index;
  if (index >= kMaxFrames || local_base + function.local_bytes > kMaxLocalBytes) {
    fail(warp, -1, ReportKind::kOutOfBounds, "Stack overflow: calls nested too deeply.");
  }
  if (index == warp.frames.size()) warp.frames.emplace_back();
  Frame& frame = warp.frames[index];
  frame.function = &function;
  frame.local_base = local_base;
  frame.registers = take_registers(*warp.worker, function.register_bytes);
  std::memset(frame.registers.get(), kPoison, function.register_bytes);
  grow_local(warp, local_base + function.local_bytes);
  fill_frame_values(warp, frame);
  return static_cast<int>(index);
}

void free_frame(Warp& warp, int index) {
  constexpr size_t kKept = 256;
  Frame& frame = warp.frames[index];
  if (warp.worker->free_registers.size() < kKept) {
    warp.worker->free_registers.emplace_back(frame.function->register_bytes,
                                             std::move(frame.registers));
  }
  frame = Frame();
}

}  // namespace gpu_emulator::exec
