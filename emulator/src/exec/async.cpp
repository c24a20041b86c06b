#include "async.h"

#include <algorithm>

#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {

IssueSite issue_site(Warp& warp, int lane) { return {&warp, warp.function, warp.pc, lane}; }

void resolve_ranges(Warp& warp, int lane, AsyncRanges& ranges) {
  AccessForm form;
  form.space = ranges.space;
  form.kind = ranges.kind;
  form.proxy = Proxy::kAsync;
  form.bytes = ranges.bytes;
  form.counted = false;
  form.shown = false;
  ranges.host.clear();
  for (uint64_t address : ranges.address) {
    ranges.host.push_back(resolve_one(warp, form, lane, address));
  }
}

void show_ranges(Warp& warp, int lane, const AsyncRanges& ranges, Moment moment,
                 std::vector<std::byte>* undefined) {
  Observer* observer = observer_of(warp);
  if (!observer) return;
  // One lane has issued them all: one call each.
  uint64_t address[kWarpSize] = {};
  std::byte* host[kWarpSize] = {};
  Access access;
  access.space = ranges.space;
  access.kind = ranges.kind;
  access.proxy = ranges.proxy;
  access.bytes = ranges.bytes;
  access.mask = 1u << lane;
  access.address = address;
  access.host = host;
  std::vector<std::byte> own;
  if (moment == Moment::kCompletion) access.undefined = &own;
  const bool is_load = ranges.kind == AccessKind::kLoad;
  for (size_t i = 0; i < ranges.address.size(); ++i) {
    own.clear();
    if (!is_load && undefined && !undefined->empty()) {
      const auto begin = undefined->begin() + static_cast<ptrdiff_t>(i * ranges.bytes);
      own.assign(begin, begin + ranges.bytes);
    }
    address[lane] = ranges.address[i];
    host[lane] = ranges.host[i];
    if (moment == Moment::kIssue) {
      observer->async_begins(warp, access);
    } else {
      observer->access(warp, access);
    }
    if (is_load && undefined && !own.empty()) {
      undefined->resize(ranges.address.size() * ranges.bytes);
      std::copy(own.begin(), own.end(),
                undefined->begin() + static_cast<ptrdiff_t>(i * ranges.bytes));
    }
  }
}

bool defers(Cluster& cluster) {
  switch (cluster.launch->options->mode) {
    case Mode::kEager:
      return false;
    case Mode::kLate:
      return true;
    case Mode::kRandom:
      break;
  }
  return cluster.random() % 2 == 0;
}

void count_bytes(Warp& warp, uint64_t bytes) {
  if (warp.worker->count) warp.worker->current[warp.pc].bytes += bytes;
}

void shared_addresses(Warp& warp, const Instruction& in, uint32_t mask, uint64_t* address,
                      const char* what) {
  addresses(warp, in.a, in.wide_address, in.imm, address);
  if (in.space != Space::kGeneric) return;
  for_each_lane(mask, [&](int lane) {
    if (space_of_generic(address[lane]) != Space::kShared) {
      fail(warp, lane, ReportKind::kInvalidOperand,
           format("The address 0x%llx of the %s is not in shared memory.",
                  static_cast<unsigned long long>(address[lane]), what));
    }
    address[lane] &= ~kWindowMask;
  });
}

}  // namespace gpu_emulator::exec
