#include "memory.h"

#include <algorithm>

#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

const char* verb(AccessKind kind) {
  switch (kind) {
    case AccessKind::kLoad:
      return "read";
    case AccessKind::kStore:
      return "write";
    default:
      return "atomic operation";
  }
}

const char* name_of(Space space) {
  switch (space) {
    case Space::kGlobal:
      return "global";
    case Space::kShared:
      return "shared";
    case Space::kLocal:
      return "local";
    case Space::kParam:
      return "parameter";
    default:
      return "generic";
  }
}

std::string describe(const AccessForm& form, uint64_t address) {
  return format("%s of %u bytes at %s address 0x%llx", verb(form.kind), form.bytes,
                name_of(form.space), static_cast<unsigned long long>(address));
}

[[noreturn]] void fail_misaligned(const Warp& warp, int lane, const AccessForm& form,
                                  uint64_t address) {
  fail(warp, lane, ReportKind::kMisaligned,
       "Misaligned " + describe(form, address) +
           format(": it must be a multiple of %u.", form.alignment));
}

[[noreturn]] void fail_shared(const Warp& warp, int lane, const AccessForm& form, uint64_t address,
                              const Cta& owner) {
  fail(warp, lane, ReportKind::kOutOfBounds,
       "Out of bounds: " + describe(form, address) +
           format("; the CTA has %u bytes of shared memory, addresses 0x%x to 0x%x.",
                  owner.shared_bytes, owner.rank << kSharedRankShift | kSharedBase,
                  (owner.rank << kSharedRankShift | kSharedBase) + owner.shared_bytes));
}

// ------------------------------------------------------------------------------------------ global

// What lies shortly before a wild address: an index too large is the usual reason for one.
std::string nearest_range(const MemoryMap& memory, uint64_t address) {
  constexpr uint64_t kNear = 4096;
  for (uint64_t back = 1; back <= kNear && back <= address; back *= 2) {
    const MemoryMap::Range* range = memory.find(address - back);
    if (!range) continue;
    return format(", %llu bytes past the end of the ",
                  static_cast<unsigned long long>(address - range->end)) +
           range->what;
  }
  return "";
}

std::byte* resolve_global_lane(Warp& warp, const AccessForm& form, int lane, uint64_t address) {
  if (address & (form.alignment - 1)) fail_misaligned(warp, lane, form, address);
  const MemoryMap& memory = *launch_of(warp).memory;
  const MemoryMap::Range* range = memory.find(address);
  if (!range) {
    fail(warp, lane, ReportKind::kWildPointer,
         "Wild pointer: " + describe(form, address) + "; nothing is allocated there" +
             nearest_range(memory, address) + ".");
  }
  if (address + form.bytes > range->end || address + form.bytes < address) {
    fail(warp, lane, ReportKind::kOutOfBounds,
         "Out of bounds: " + describe(form, address) +
             format(" ends %llu bytes past the end of the ",
                    static_cast<unsigned long long>(address + form.bytes - range->end)) +
             range->what + ".");
  }
  const bool writes = form.kind != AccessKind::kLoad;
  if (writes ? !range->writable : !range->readable) {
    fail(warp, lane, ReportKind::kReadOnly,
         "Forbidden: " + describe(form, address) + " in the " + range->what + ".");
  }
  warp.worker->global.add({range->begin, range->end, range->writable});
  return reinterpret_cast<std::byte*>(address);
}

// Whether the accesses of all lanes lie in [begin, end) and are aligned; end - begin < 2^62.
bool all_inside(const AccessForm& form, uint32_t mask, const uint64_t* address, uint64_t begin,
                uint64_t end) {
  if (end - begin < form.bytes) return false;
  const uint64_t last = end - form.bytes;
  uint64_t outside = 0, bits = 0;  // outside: the top bit
  for_each_lane(mask, [&](int lane) {
    outside |= (address[lane] - begin) | (last - address[lane]);
    bits |= address[lane];
  });
  return !(outside >> 63) && !(bits & (form.alignment - 1));
}

// host[lane] = address[lane] + offset.
void translate(uint32_t mask, const uint64_t* address, uint64_t offset, std::byte** host) {
  for_each_lane(
      mask, [&](int lane) { host[lane] = reinterpret_cast<std::byte*>(address[lane] + offset); });
}

bool allows(const RangeCache::Range& range, const AccessForm& form) {
  return form.kind == AccessKind::kLoad || range.writable;
}

void resolve_global(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
                    std::byte** host) {
  translate(mask, address, 0, host);
  RangeCache& cache = warp.worker->global;
  const RangeCache::Range* range = cache.find(address[first_lane(mask)]);
  if (range && allows(*range, form) && all_inside(form, mask, address, range->begin, range->end)) {
    return;
  }
  for_each_lane(mask, [&](int lane) {
    const RangeCache::Range* own = cache.find(address[lane]);
    const bool known =
        own && allows(*own, form) && all_inside(form, 1u << lane, address, own->begin, own->end);
    if (!known) host[lane] = resolve_global_lane(warp, form, lane, address[lane]);
  });
}

// ------------------------------------------------------------------------------------------ shared

std::byte* resolve_shared_lane(Warp& warp, const AccessForm& form, int lane, uint64_t address) {
  Cta* owner = warp.cta;
  if (address >> kSharedRankShift != owner->rank) {
    if (address >> 32) fail_shared(warp, lane, form, address, *owner);
    owner = &shared_owner(warp, lane, static_cast<uint32_t>(address));
  }
  const uint32_t offset = address & kSharedOffsetMask;
  if (offset & (form.alignment - 1)) fail_misaligned(warp, lane, form, address);
  if (offset < kSharedBase || uint64_t{offset} + form.bytes > kSharedBase + owner->shared_bytes) {
    fail_shared(warp, lane, form, address, *owner);
  }
  return owner->shared.get() + (offset - kSharedBase);
}

void resolve_shared(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
                    std::byte** host) {
  const Cta& cta = *warp.cta;
  const uint64_t begin = uint64_t{cta.rank} << kSharedRankShift | kSharedBase;
  if (all_inside(form, mask, address, begin, begin + cta.shared_bytes)) {
    translate(mask, address, reinterpret_cast<uint64_t>(cta.shared.get()) - begin, host);
    return;
  }
  for_each_lane(
      mask, [&](int lane) { host[lane] = resolve_shared_lane(warp, form, lane, address[lane]); });
}

// ---------------------------------------------------------------------------- local and parameters

void resolve_local(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
                   std::byte** host) {
  const Frame& frame = warp.frames[warp.fragment().frame];
  const uint64_t end = kLocalBase + frame.local_base + frame.function->local_bytes;
  for_each_lane(mask, [&](int lane) {
    const uint64_t a = address[lane];
    if (a & (form.alignment - 1)) fail_misaligned(warp, lane, form, a);
    if (a < kLocalBase || a + form.bytes > end || a + form.bytes < a) {
      fail(warp, lane, ReportKind::kOutOfBounds,
           "Out of bounds: " + describe(form, a) +
               format("; the thread has %llu bytes of local memory from 0x%llx on.",
                      static_cast<unsigned long long>(end - kLocalBase),
                      static_cast<unsigned long long>(kLocalBase)));
    }
    host[lane] = warp.local_memory(lane) + (a - kLocalBase);
  });
}

void resolve_param(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
                   std::byte** host) {
  const std::vector<std::byte>& block = launch_of(warp).launch->params;
  if (form.kind == AccessKind::kLoad && all_inside(form, mask, address, 0, block.size())) {
    translate(mask, address, reinterpret_cast<uint64_t>(block.data()), host);
    return;
  }
  for_each_lane(mask, [&](int lane) {
    const uint64_t a = address[lane];
    if (form.kind != AccessKind::kLoad) {
      fail(warp, lane, ReportKind::kReadOnly,
           "Forbidden: " + describe(form, a) + "; an entry's parameters are read-only.");
    }
    if (a & (form.alignment - 1)) fail_misaligned(warp, lane, form, a);
    if (a > block.size() || form.bytes > block.size() - a) {
      fail(warp, lane, ReportKind::kOutOfBounds,
           "Out of bounds: " + describe(form, a) +
               format("; the kernel has %zu bytes of parameters.", block.size()));
    }
    host[lane] = const_cast<std::byte*>(block.data()) + a;
  });
}

// ---------------------------------------------------------------------------------------- counters

constexpr int kWavefrontBytes = 128;

// Distinct units among those of one group of lanes, per residue: the wavefronts it takes. A
// wavefront reads 128 bytes, one unit a residue.
int wavefronts_of_group(const uint64_t* unit, int lanes, int residues) {
  uint64_t kept[32][32];
  int count[32] = {};
  int most = 0;
  for (int i = 0; i < lanes; ++i) {
    const int residue = static_cast<int>(unit[i] % residues);
    uint64_t* list = kept[residue];
    if (std::find(list, list + count[residue], unit[i]) != list + count[residue]) continue;
    list[count[residue]++] = unit[i];
    most = std::max(most, count[residue]);
  }
  return most;
}

// Of the lanes served together, in order of the lanes.
uint64_t wavefronts_of(const uint64_t* unit, int lanes, int residues) {
  uint32_t seen = 0, repeated = 0;
  for (int i = 0; i < lanes; ++i) {
    const uint32_t bit = 1u << (unit[i] & (residues - 1));
    repeated |= seen & bit;
    seen |= bit;
  }
  return repeated ? wavefronts_of_group(unit, lanes, residues) : 1;
}

// Whether a group of kResidues lanes has each residue once.
template <int kResidues>
bool takes_one_wavefront(const uint64_t* unit) {
  uint32_t seen = 0;
  for (int i = 0; i < kResidues; ++i) seen |= 1u << (unit[i] & (kResidues - 1));
  return seen == ~0u >> (32 - kResidues);
}

template <int kResidues>
void count_whole_warp(InstructionCounters& counters, const uint64_t* address) {
  constexpr int kUnitBytes = kWavefrontBytes / kResidues;
  uint64_t unit[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) unit[i] = address[i] / kUnitBytes;
  for (int first = 0; first < kWarpSize; first += kResidues) {
    counters.ideal_wavefronts += 1;
    counters.wavefronts += takes_one_wavefront<kResidues>(unit + first)
                               ? 1
                               : wavefronts_of(unit + first, kResidues, kResidues);
  }
}

void count_some_lanes(InstructionCounters& counters, int residues, uint32_t mask,
                      const uint64_t* address) {
  const int unit_bytes = kWavefrontBytes / residues;
  for (int first = 0; first < kWarpSize; first += residues) {
    uint64_t unit[kWarpSize];
    int lanes = 0;
    for (int lane = first; lane < first + residues; ++lane) {
      if (mask >> lane & 1) unit[lanes++] = address[lane] / unit_bytes;
    }
    if (!lanes) continue;
    counters.ideal_wavefronts += 1;
    counters.wavefronts += wavefronts_of(unit, lanes, residues);
  }
}

void count_shared(InstructionCounters& counters, const AccessForm& form, uint32_t mask,
                  const uint64_t* address) {
  const int unit_bytes = std::clamp<int>(static_cast<int>(form.bytes), 4, 16);
  const int residues = kWavefrontBytes / unit_bytes;  // also lanes served together
  if (mask != kAllLanes) {
    count_some_lanes(counters, residues, mask, address);
  } else if (residues == 8) {
    count_whole_warp<8>(counters, address);
  } else if (residues == 16) {
    count_whole_warp<16>(counters, address);
  } else {
    count_whole_warp<32>(counters, address);
  }
}

constexpr int kSectorBytes = 32;

int sectors_in_any_order(const AccessForm& form, uint32_t mask, const uint64_t* address) {
  uint64_t sectors[2 * kWarpSize];
  int count = 0;
  for_each_lane(mask, [&](int lane) {
    const uint64_t last = (address[lane] + form.bytes - 1) / kSectorBytes;
    for (uint64_t sector = address[lane] / kSectorBytes; sector <= last; ++sector) {
      if (count && sectors[count - 1] == sector) continue;
      if (count < 2 * kWarpSize) sectors[count++] = sector;
    }
  });
  std::sort(sectors, sectors + count);
  return static_cast<int>(std::unique(sectors, sectors + count) - sectors);
}

// Distinct sectors that the lanes touch.
int sectors_of(const AccessForm& form, uint32_t mask, const uint64_t* address) {
  uint64_t end = 0;  // behind the last sector
  int count = 0;
  bool ascending = form.bytes <= kSectorBytes;
  for_each_lane(mask, [&](int lane) {
    const uint64_t first = address[lane] / kSectorBytes;
    const uint64_t last = (address[lane] + form.bytes - 1) / kSectorBytes;
    ascending &= first + 1 >= end;
    count += static_cast<int>(last + 1 - std::max(first, end));
    end = last + 1;
  });
  return ascending ? count : sectors_in_any_order(form, mask, address);
}

void count_global(InstructionCounters& counters, const AccessForm& form, uint32_t mask,
                  const uint64_t* address) {
  const int sectors = sectors_of(form, mask, address);
  const uint64_t bytes = uint64_t{form.bytes} * lane_count(mask);
  counters.requests += 1;
  counters.sectors += sectors;
  counters.ideal_sectors += std::min<uint64_t>(sectors, (bytes + kSectorBytes - 1) / kSectorBytes);
}

void show(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
          std::byte* const* host) {
  if (warp.worker->count && form.counted) {
    InstructionCounters& counters = warp.worker->current[warp.pc];
    counters.bytes += uint64_t{form.bytes} * lane_count(mask);
    if (form.space == Space::kShared) count_shared(counters, form, mask, address);
    if (form.space == Space::kGlobal) count_global(counters, form, mask, address);
  }
  if (Observer* observer = form.shown ? observer_of(warp) : nullptr) {
    Access access;
    access.space = form.space;
    access.kind = form.kind;
    access.proxy = form.proxy;
    access.order = form.order;
    access.scope = form.scope;
    access.bytes = form.bytes;
    access.mask = mask;
    access.address = address;
    access.host = host;
    if (form.announce_only) {
      observer->async_begins(warp, access);
    } else {
      observer->access(warp, access);
    }
  }
}

void resolve_in_space(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
                      std::byte** host) {
  switch (form.space) {
    case Space::kGlobal:
      resolve_global(warp, form, mask, address, host);
      break;
    case Space::kShared:
      resolve_shared(warp, form, mask, address, host);
      break;
    case Space::kLocal:
      resolve_local(warp, form, mask, address, host);
      break;
    default:
      resolve_param(warp, form, mask, address, host);
      break;
  }
  show(warp, form, mask, address, host);
}

// Lanes of a generic (or .param, whose variables may lie in the frame) access, by their space.
void resolve_mixed(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
                   std::byte** host) {
  uint64_t bits = 0;
  for_each_lane(mask, [&](int lane) { bits |= address[lane]; });
  const bool all_global = form.space == Space::kGeneric && !(bits & kWindowMask);
  if (all_global || (form.space == Space::kParam && bits < kLocalBase)) {
    AccessForm one = form;
    one.space = all_global ? Space::kGlobal : Space::kParam;
    resolve_in_space(warp, one, mask, address, host);
    return;
  }
  uint32_t lanes[4] = {};  // global, shared, local, param
  uint64_t plain[kWarpSize];
  for_each_lane(mask, [&](int lane) {
    Space space = form.space;
    plain[lane] = address[lane];
    if (space == Space::kGeneric) {
      space = space_of_generic(address[lane]);
      if (space != Space::kGlobal) plain[lane] &= ~kWindowMask;
    } else if (address[lane] >= kLocalBase) {
      space = Space::kLocal;
    }
    lanes[static_cast<int>(space) - static_cast<int>(Space::kGlobal)] |= 1u << lane;
  });
  for (int i = 0; i < 4; ++i) {
    if (!lanes[i]) continue;
    AccessForm one = form;
    one.space = static_cast<Space>(i + static_cast<int>(Space::kGlobal));
    resolve_in_space(warp, one, lanes[i], plain, host);
  }
}

}  // namespace

Space space_of_generic(uint64_t address) {
  switch (address & kWindowMask) {
    case kSharedWindow:
      return Space::kShared;
    case kLocalWindow:
      return Space::kLocal;
    case kParamWindow:
      return Space::kParam;
    default:
      return Space::kGlobal;
  }
}

Cta& shared_owner(const Warp& warp, int lane, uint32_t address) {
  Cluster& cluster = *warp.cta->cluster;
  const uint32_t rank = address >> kSharedRankShift;
  if (rank >= cluster.ctas.size()) {
    fail(warp, lane, ReportKind::kOutOfBounds,
         format("Out of bounds: shared address 0x%x is of CTA %u of the cluster, which has %zu.",
                address, rank, cluster.ctas.size()));
  }
  Cta& owner = *cluster.ctas[rank];
  if (&owner != warp.cta && owner.live_threads() == 0) {
    fail(warp, lane, ReportKind::kOutOfBounds,
         format("Out of bounds: shared address 0x%x is of CTA %u of the cluster, which has exited.",
                address, rank));
  }
  return owner;
}

void resolve(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
             std::byte** host) {
  if (form.space == Space::kGeneric || form.space == Space::kParam) {
    resolve_mixed(warp, form, mask, address, host);
  } else {
    resolve_in_space(warp, form, mask, address, host);
  }
}

std::byte* resolve_one(Warp& warp, const AccessForm& form, int lane, uint64_t address) {
  uint64_t all[kWarpSize] = {};
  std::byte* host[kWarpSize];
  all[lane] = address;
  resolve(warp, form, 1u << lane, all, host);
  return host[lane];
}

}  // namespace gpu_emulator::exec
