#include "bulk_copy.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "hopper_state.h"
#include "number_formats.h"
#include "report.h"
#include "swizzle.h"

namespace gpu_emulator::exec {
namespace {

constexpr uint32_t kChunkBytes = 16;

// Calls f(index of the row, its address or nullopt) for the box's rows along dimension 0.
template <class F>
void for_each_row(const TensorMap& map, const int32_t* coordinates, F&& f) {
  uint32_t count[kMaxTensorRank];
  for (int i = 0; i < kMaxTensorRank; ++i) count[i] = i < map.rank ? box_elements(map, i) : 1;
  const uint32_t rows = count[1] * count[2] * count[3] * count[4];
  for (uint32_t row = 0; row < rows; ++row) {
    uint64_t address = map.base;
    bool inside = true;
    uint32_t rest = row;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t at =
          int64_t{coordinates[i]} + int64_t{rest % count[i]} * map.element_strides[i];
      rest /= count[i];
      inside &= at >= 0 && static_cast<uint64_t>(at) < map.dims[i];
      address += static_cast<uint64_t>(at) * map.strides[i - 1];
    }
    if (inside) f(row, address);
  }
}

AsyncRanges shared_range(uint64_t address, uint32_t bytes, AccessKind kind) {
  AsyncRanges ranges;
  ranges.space = Space::kShared;
  ranges.kind = kind;
  ranges.bytes = bytes;
  ranges.address = {address};
  return ranges;
}

// Segments of one box all have the same size, as all rows are cut at the same place.
AsyncRanges global_ranges(const BulkCopy& copy, AccessKind kind) {
  AsyncRanges ranges;
  ranges.kind = kind;
  if (!copy.segments.empty()) ranges.bytes = copy.segments[0].bytes;
  for (const Segment& segment : copy.segments) ranges.address.push_back(segment.global);
  return ranges;
}

void flush(std::byte* box, uint32_t bytes) {
  for (uint32_t i = 0; i < bytes; i += 4) {
    float value;
    std::memcpy(&value, box + i, 4);
    value = flushed(value);
    std::memcpy(box + i, &value, 4);
  }
}

void write_shared(const BulkCopy& copy, uint64_t address, std::byte* host) {
  if (copy.reduction) {
    reduce(*copy.reduction, host, copy.box.data(), copy.bytes);
  } else {
    to_swizzled(copy.box.data(), copy.bytes, static_cast<uint32_t>(address), copy.swizzle, host);
  }
}

void plan(BulkCopy& copy) {
  const auto store = copy.reduction ? AccessKind::kAtomic : AccessKind::kStore;
  if (copy.direction == BulkDirection::kGlobalToShared) {
    copy.loads.push_back(global_ranges(copy, AccessKind::kLoad));
  } else if (copy.direction != BulkDirection::kRegistersToShared) {
    copy.loads.push_back(shared_range(copy.source, copy.bytes, AccessKind::kLoad));
  }
  if (copy.direction == BulkDirection::kSharedToGlobal) {
    copy.stores.push_back(global_ranges(copy, store));
  }
  for (uint64_t address : copy.destinations) {
    copy.stores.push_back(shared_range(address, copy.bytes, store));
  }
  Warp& warp = *copy.site.warp;
  for (auto* list : {&copy.loads, &copy.stores}) {
    for (AsyncRanges& ranges : *list) {
      ranges.proxy = copy.proxy;
      resolve_ranges(warp, copy.site.lane, ranges);
    }
  }
  if (copy.proxy != Proxy::kAsync) return;
  for (auto* list : {&copy.loads, &copy.stores}) {
    for (AsyncRanges& ranges : *list) show_ranges(warp, copy.site.lane, ranges, Moment::kIssue);
  }
}

void read(BulkCopy& copy) {
  if (std::exchange(copy.was_read, true)) return;
  copy.box.resize(copy.bytes);
  if (copy.direction != BulkDirection::kGlobalToShared) {
    from_swizzled(copy.box.data(), copy.bytes, static_cast<uint32_t>(copy.source), copy.swizzle,
                  copy.loads[0].host[0]);
    return;
  }
  for (size_t i = 0; i < copy.bytes && !copy.fill.empty(); ++i) {
    copy.box[i] = copy.fill[i % copy.fill.size()];
  }
  for (size_t i = 0; i < copy.segments.size(); ++i) {
    const Segment& segment = copy.segments[i];
    std::memcpy(copy.box.data() + segment.linear, copy.loads[0].host[i], segment.bytes);
  }
  if (copy.flush_subnormals) flush(copy.box.data(), copy.bytes);
}

void write(BulkCopy& copy) {
  if (std::exchange(copy.was_written, true)) return;
  if (copy.direction != BulkDirection::kSharedToGlobal) {
    for (size_t i = 0; i < copy.destinations.size(); ++i) {
      write_shared(copy, copy.destinations[i], copy.stores[i].host[0]);
    }
    return;
  }
  for (size_t i = 0; i < copy.segments.size(); ++i) {
    const Segment& segment = copy.segments[i];
    const std::byte* from = copy.box.data() + segment.linear;
    if (copy.reduction) {
      reduce(*copy.reduction, copy.stores[0].host[i], from, segment.bytes);
    } else {
      std::memcpy(copy.stores[0].host[i], from, segment.bytes);
    }
  }
}

// Which bytes of the box are undefined, from those found in the source's ranges.
std::vector<std::byte> undefined_of_box(const BulkCopy& copy, const std::vector<std::byte>& found) {
  std::vector<std::byte> undefined;
  if (found.empty()) return undefined;
  undefined.resize(copy.bytes);
  if (copy.direction != BulkDirection::kGlobalToShared) {
    from_swizzled(undefined.data(), copy.bytes, static_cast<uint32_t>(copy.source), copy.swizzle,
                  found.data());
    return undefined;
  }
  const std::byte* from = found.data();
  for (const Segment& segment : copy.segments) {
    std::memcpy(undefined.data() + segment.linear, from, segment.bytes);
    from += segment.bytes;
  }
  return undefined;
}

// And of a destination's ranges, from those of the box. address: of a destination in shared memory.
std::vector<std::byte> undefined_of_destination(const BulkCopy& copy, uint64_t address) {
  std::vector<std::byte> undefined;
  if (copy.undefined.empty()) return undefined;
  if (copy.direction == BulkDirection::kSharedToGlobal) {
    for (const Segment& segment : copy.segments) {
      const auto begin = copy.undefined.begin() + segment.linear;
      undefined.insert(undefined.end(), begin, begin + segment.bytes);
    }
    return undefined;
  }
  if (copy.reduction) return copy.undefined;
  undefined.resize(copy.bytes);
  to_swizzled(copy.undefined.data(), copy.bytes, static_cast<uint32_t>(address), copy.swizzle,
              undefined.data());
  return undefined;
}

void poison(BulkCopy& copy) {
  if (copy.reduction || copy.direction == BulkDirection::kSharedToGlobal) return;
  for (AsyncRanges& ranges : copy.stores) std::memset(ranges.host[0], kPoison, ranges.bytes);
}

// A CTA's shared memory is gone when all its threads have exited. Whether those of all destinations
// are there.
bool is_alive(const BulkCopy& copy) {
  Warp& warp = *copy.site.warp;
  for (uint64_t address : copy.destinations) {
    const Cta& cta = *warp.cta->cluster->ctas[address >> kSharedRankShift];
    if (cta.live_threads()) continue;
    if (!reports(warp, ReportKind::kCopyAtExit)) return false;
    fail(
        warp, copy.site.lane, ReportKind::kCopyAtExit,
        format("CTA %u of the cluster exited while this copy into its shared memory was in flight.",
               cta.rank));
  }
  return true;
}

}  // namespace

std::vector<Segment> box_segments(const TensorMap& map, const int32_t* coordinates) {
  const int64_t element = element_bytes(map.element);
  const int64_t first = std::max<int64_t>(coordinates[0], 0);
  const int64_t end =
      std::min<int64_t>(int64_t{coordinates[0]} + map.box[0], static_cast<int64_t>(map.dims[0]));
  std::vector<Segment> segments;
  if (first >= end) return segments;
  for_each_row(map, coordinates, [&](uint32_t row, uint64_t address) {
    Segment segment;
    segment.global = address + static_cast<uint64_t>(first * element);
    segment.linear =
        static_cast<uint32_t>((int64_t{row} * map.box[0] + first - coordinates[0]) * element);
    segment.bytes = static_cast<uint32_t>((end - first) * element);
    segments.push_back(segment);
  });
  return segments;
}

std::vector<std::byte> fill_pattern(const TensorMap& map) {
  const int bytes = element_bytes(map.element);
  std::vector<std::byte> pattern(bytes, std::byte{0});
  if (map.fill == TensorFill::kNan) {  // the quiet NaN with all mantissa bits: 0x7fff...
    std::fill(pattern.begin(), pattern.end(), std::byte{0xff});
    pattern.back() = std::byte{0x7f};
  }
  return pattern;
}

void to_swizzled(const std::byte* box, uint32_t bytes, uint32_t address, uint32_t width,
                 std::byte* host) {
  for (uint32_t i = 0; i < bytes; i += kChunkBytes) {
    const uint32_t place = swizzled(address + i, width) - address;
    std::memcpy(host + static_cast<int32_t>(place), box + i, std::min(kChunkBytes, bytes - i));
  }
}

void from_swizzled(std::byte* box, uint32_t bytes, uint32_t address, uint32_t width,
                   const std::byte* host) {
  for (uint32_t i = 0; i < bytes; i += kChunkBytes) {
    const uint32_t place = swizzled(address + i, width) - address;
    std::memcpy(box + i, host + static_cast<int32_t>(place), std::min(kChunkBytes, bytes - i));
  }
}

void issue_to_mbarriers(std::shared_ptr<BulkCopy> copy, const char* what) {
  for (uint64_t address : copy->mbarriers) mbarrier_at(*copy->site.warp, copy->site.lane, address);
  plan(*copy);
  Cluster& cluster = *copy->site.warp->cta->cluster;
  if (cluster.launch->options->mode != Mode::kEager) poison(*copy);
  AsyncOperation operation;
  operation.what = what;
  operation.complete = [copy] {
    at_site(copy->site, [&] {
      if (!is_alive(*copy)) return;
      complete_reads(*copy);
      complete_writes(*copy);
      for (uint64_t address : copy->mbarriers) {
        complete_transfer(*copy->site.warp, copy->site.lane, address, copy->bytes, copy->proxy);
      }
    });
  };
  operation.abandon = [copy] {
    at_site(copy->site, [&] {
      if (!reports(*copy->site.warp, ReportKind::kCopyAtExit)) return;
      fail(*copy->site.warp, copy->site.lane, ReportKind::kCopyAtExit,
           "All threads exited while this copy into shared memory was in flight: nobody waited "
           "for it.");
    });
  };
  cluster.submit(std::move(operation));
}

void issue_to_group(std::shared_ptr<BulkCopy> copy) {
  plan(*copy);
  Warp& warp = *copy->site.warp;
  if (!defers(*warp.cta->cluster)) {
    read(*copy);
    write(*copy);
  }
  HopperWarpState& state = hopper(warp);
  const uint32_t group = state.bulk_groups[copy->site.lane];
  state.bulk.push_back({std::move(copy), group});
}

void complete_reads(BulkCopy& copy) {
  if (std::exchange(copy.reads_complete, true)) return;
  read(copy);
  for (const AsyncRanges& ranges : copy.loads) {
    std::vector<std::byte> found;
    show_ranges(*copy.site.warp, copy.site.lane, ranges, Moment::kCompletion, &found);
    copy.undefined = undefined_of_box(copy, found);
  }
}

void complete_writes(BulkCopy& copy) {
  for (const AsyncRanges& ranges : copy.stores) {
    const uint64_t address = ranges.address.empty() ? 0 : ranges.address[0];
    std::vector<std::byte> undefined = undefined_of_destination(copy, address);
    show_ranges(*copy.site.warp, copy.site.lane, ranges, Moment::kCompletion, &undefined);
  }
  write(copy);
}

}  // namespace gpu_emulator::exec
