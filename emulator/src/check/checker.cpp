#include "checker.h"

#include <algorithm>
#include <iterator>

#include "../exec/wgmma.h"
#include "launch_checker.h"

namespace gpu_emulator::check {
namespace {

bool is_in_own_cta(const Warp& warp, const Access& access) {
  uint64_t others = 0;
  const uint64_t rank = warp.cta->rank;
  for_each_lane(access.mask,
                [&](int lane) { others |= access.address[lane] >> kSharedRankShift ^ rank; });
  return others == 0;
}

// Whether each lane stores a whole granule, by the generic proxy.
bool stores_granules(const Access& access) {
  if (access.kind != AccessKind::kStore || access.proxy != Proxy::kGeneric) return false;
  uint64_t bits = 0;
  for_each_lane(access.mask, [&](int lane) { bits |= access.address[lane]; });
  return access.bytes == kGranuleBytes && bits % kGranuleBytes == 0;
}

// Whether each lane's access is of a whole cell, by the generic proxy or cp.async.
bool is_of_cells(const Access& access) {
  if (access.bytes != kCellBytes || access.proxy == Proxy::kAsync) return false;
  uint64_t bits = 0;
  for_each_lane(access.mask, [&](int lane) { bits |= access.address[lane]; });
  return bits % kCellBytes == 0;
}
bool reads_cells(const Access& access) {
  return access.kind == AccessKind::kLoad && is_of_cells(access);
}
bool copies_cells(const Access& access) {
  return access.kind == AccessKind::kStore && access.proxy == Proxy::kCopy && is_of_cells(access);
}

// An atomic operation whose result does not depend on what was there; mbarriers are initialised by
// a store.
bool replaces(const Warp& warp) {
  const exec::Effects& effects = warp.function->effects[warp.pc];
  return effects.flow != exec::Flow::kAtomic || effects.bits == 1;
}

// Asynchronous operations in pieces whose definedness fits a word, and that whole cells make up.
constexpr uint32_t kPieceBytes = 64;
uint32_t piece_at(uint64_t address, uint64_t left) {
  return static_cast<uint32_t>(std::min(kPieceBytes - address % kPieceBytes, left));
}

// Access::undefined from byte `first` on, as bits; and the other way round.
uint64_t undefined_of(const Access& access, size_t first, uint32_t bytes) {
  uint64_t undefined = 0;
  if (access.undefined->empty()) return 0;
  for (uint32_t i = 0; i < bytes; ++i) {
    undefined |= uint64_t{(*access.undefined)[first + i] != std::byte{0}} << i;
  }
  return undefined;
}
void leave_undefined(const Access& access, size_t first, uint32_t bytes, uint64_t undefined) {
  if (access.undefined->empty()) {
    access.undefined->resize(size_t{access.bytes} * __builtin_popcount(access.mask));
  }
  for (uint32_t i = 0; i < bytes; ++i) {
    (*access.undefined)[first + i] = std::byte{static_cast<uint8_t>(undefined >> i & 1)};
  }
}

}  // namespace

// -----------------------------------------------------------------------------------------
// clusters

// Of the launch's CTAs, all of one size: one that has ended leaves its shadow to another.
std::unique_ptr<SharedShadow> Checker::make_shadow(const exec::Cta& cta) {
  const uint64_t base = uint64_t{cta.rank} << kSharedRankShift | kSharedBase;
  std::unique_ptr<SharedShadow> shadow;
  {
    const std::lock_guard lock(clusters_mutex_);
    if (!free_shadows_.empty()) {
      shadow = std::move(free_shadows_.back());
      free_shadows_.pop_back();
    }
  }
  if (!shadow) {
    return std::make_unique<SharedShadow>(Space::kShared, base, cta.shared_bytes, follow_values_);
  }
  shadow->reset(base);
  return shadow;
}

void Checker::cluster_begins(exec::Cluster& cluster) {
  auto state = std::make_unique<ClusterState>();
  state->order.index = cluster.index;
  state->order.ctas.resize(cluster.ctas.size());
  size_t agents = 0;
  for (const auto& cta : cluster.ctas) agents += cta->warps.size();
  state->order.agents = static_cast<int>(agents);
  const Clock nothing(state->order.agents);
  state->order.barrier = {nothing, nothing, {}, true};
  for (const auto& cta : cluster.ctas) {
    for (CtaBarrierClock& barrier : state->order.ctas[cta->rank].barriers) {
      barrier.pending = nothing;
    }
    state->shared.push_back(make_shadow(*cta));
    for (const auto& warp : cta->warps) {
      auto own = std::make_unique<WarpState>();
      own->order.cluster = &state->order;
      own->order.agent = static_cast<uint32_t>(state->warps.size());
      own->order.lanes = warp->live;
      own->order.groups.push_back({exec::kAllLanes, nothing});
      warp->observed = own.get();
      state->warps.push_back(std::move(own));
    }
  }
  cluster.observed = state.get();
  const std::lock_guard lock(clusters_mutex_);
  clusters_[&cluster] = std::move(state);
}

void Checker::cluster_ends(exec::Cluster& cluster) {
  std::unique_ptr<ClusterState> state;
  {
    const std::lock_guard lock(clusters_mutex_);
    state = std::move(clusters_.extract(&cluster).mapped());
    std::move(state->shared.begin(), state->shared.end(), std::back_inserter(free_shadows_));
  }
  cluster.observed = nullptr;
  if (state->undefined_output) throw *state->undefined_output;
}

// -----------------------------------------------------------------------------------------
// accesses

Actor Checker::actor_of(Warp& warp, const Access& access) const {
  WarpState& state = state_of(warp);
  const bool is_strong = access.kind == AccessKind::kAtomic || access.order != exec::Order::kWeak;
  AccessState kind = is_strong ? AccessState::kStrong : AccessState::kPlain;
  if (access.proxy == Proxy::kAsync) {
    kind = access.kind == AccessKind::kAtomic ? AccessState::kAsyncStrong : AccessState::kAsync;
  }
  return {&warp,
          &state.order,
          state.order.common_clock(access.mask),
          kind,
          access.kind != AccessKind::kLoad,
          order_accesses_,
          sites_.site(warp.function, warp.pc)};
}

void Checker::access(Warp& warp, const Access& access) {
  repeat_strong_reads(warp);
  switch (access.space) {
    case Space::kShared:
      access_shared(warp, access);
      break;
    case Space::kGlobal:
      access_global(warp, access);
      break;
    case Space::kLocal:
      access_local(warp, access);
      return;
    default:
      return;
  }
  const bool is_strong = access.kind == AccessKind::kAtomic || access.order != exec::Order::kWeak;
  if (is_strong && access.proxy == Proxy::kGeneric) strong(warp, access);
}

uint64_t Checker::access_shared_lane(const Actor& actor, const Access& access, int lane) {
  Warp& warp = *actor.warp;
  const uint64_t address = access.address[lane];
  SharedShadow& shadow = *state_of(*warp.cta->cluster).shared[address >> kSharedRankShift];
  const auto offset = static_cast<uint32_t>((address & kSharedOffsetMask) - kSharedBase);
  if (access.kind == AccessKind::kLoad) {
    return shadow.read(actor, lane, offset, access.bytes, *this);
  }
  if (access.proxy == Proxy::kCopy) {
    uint64_t& undefined = state_of(warp).copied[lane];
    shadow.finish_write(actor, lane, offset, access.bytes, undefined, *this);
    undefined = 0;
  } else {
    const uint64_t undefined = follow_values_ ? values_.stored(warp, lane) : 0;
    const uint64_t before = shadow.write(actor, lane, offset, access.bytes, undefined, *this);
    if (access.kind == AccessKind::kAtomic) {
      if (before && !replaces(warp)) {
        shadow.write(actor, lane, offset, access.bytes, undefined | before, *this);
      }
      return before;
    }
  }
  return 0;
}

// The bytes of an asynchronous operation that is complete; first: of the lane in Access::undefined.
void Checker::complete_shared(const Actor& actor, const Access& access, int lane, size_t first) {
  Warp& warp = *actor.warp;
  const uint64_t address = access.address[lane];
  SharedShadow& shadow = *state_of(*warp.cta->cluster).shared[address >> kSharedRankShift];
  const auto offset = static_cast<uint32_t>((address & kSharedOffsetMask) - kSharedBase);
  const bool is_load = access.kind == AccessKind::kLoad;
  const bool whole = is_load ? !follow_values_ : access.undefined->empty();
  for (uint32_t done = 0; done < access.bytes;) {
    const uint32_t at = offset + done, left = access.bytes - done;
    const uint32_t count = whole ? left : piece_at(at, left);
    if (is_load) {
      const uint64_t undefined = shadow.finish_read(actor, lane, at, count, *this);
      if (undefined) {
        found_undefined(warp, access, lane, undefined);
        leave_undefined(access, first + done, count, undefined);
      }
    } else {
      const uint64_t undefined = whole ? 0 : undefined_of(access, first + done, count);
      uint64_t before = 0;
      if (access.kind == AccessKind::kStore && access.proxy == Proxy::kAsync) {
        shadow.finish_write(actor, lane, at, count, undefined, *this);
      } else {
        before = shadow.write(actor, lane, at, count, undefined, *this);
      }
      if (before && access.kind == AccessKind::kAtomic) {
        shadow.write(actor, lane, at, count, undefined | before, *this);
      }
    }
    done += count;
  }
}

void Checker::access_shared(Warp& warp, const Access& access) {
  const Actor actor = actor_of(warp, access);
  if (access.undefined) {
    size_t first = 0;
    for_each_lane(access.mask, [&](int lane) {
      complete_shared(actor, access, lane, first);
      first += access.bytes;
    });
    return;
  }
  if (access.kind == AccessKind::kLoad && access.proxy == Proxy::kGeneric &&
      access.bytes == kCellBytes && is_in_own_cta(warp, access)) {
    state_of(*warp.cta->cluster)
        .shared[warp.cta->rank]
        ->read_cells(actor, access.mask, access.address, *this, [&](int lane, uint64_t undefined) {
          found_undefined(warp, access, lane, undefined);
        });
    return;
  }
  if (stores_granules(access) && !(follow_values_ && values_.may_store_undefined(warp)) &&
      is_in_own_cta(warp, access)) {
    state_of(*warp.cta->cluster)
        .shared[warp.cta->rank]
        ->write_granules(actor, access.mask, access.address, *this);
    return;
  }
  if (copies_cells(access) && is_in_own_cta(warp, access)) {
    state_of(*warp.cta->cluster)
        .shared[warp.cta->rank]
        ->finish_write_cells(actor, access.mask, access.address, state_of(warp).copied.data(),
                             *this);
    return;
  }
  for_each_lane(access.mask, [&](int lane) {
    const uint64_t undefined = access_shared_lane(actor, access, lane);
    if (undefined) found_undefined(warp, access, lane, undefined);
  });
}

// Null: all is defined there.
DefinedBytes* Checker::definedness(Warp& warp, uint64_t address) const {
  if (!memory_may_be_undefined_) return nullptr;
  WarpState& state = state_of(warp);
  for (const WarpState::KnownRange& range : state.ranges) {
    if (address >= range.begin && address < range.end) return range.defined;
  }
  const MemoryMap::Range* range = launch_.memory->find(address);
  if (!range) return nullptr;
  DefinedBytes* defined = range->defined.get();
  if (defined && defined->all()) defined = nullptr;
  state.ranges[state.next_range++ % state.ranges.size()] = {range->begin, range->end, defined};
  return defined;
}

void Checker::follow_global_lane(Warp& warp, const Access& access, int lane) {
  const uint64_t address = access.address[lane];
  if (access.kind != AccessKind::kLoad) {
    require_defined(warp, access, lane, values_.stored(warp, lane));
  }
  DefinedBytes* defined = definedness(warp, address);
  if (!defined) return;
  if (access.kind != AccessKind::kStore) {
    const uint64_t undefined = defined->undefined(address, access.bytes);
    if (undefined) found_undefined(warp, access, lane, undefined);
    if (access.proxy == Proxy::kCopy) state_of(warp).copied[lane] = undefined;
    if (undefined && access.kind == AccessKind::kAtomic && !replaces(warp)) {
      combined_undefined(warp, access, lane);
    }
  }
  if (access.kind != AccessKind::kLoad) defined->set(address, access.bytes);
}

// As complete_shared().
void Checker::complete_global(Warp& warp, const Access& access, int lane, size_t first) {
  for (uint32_t done = 0; done < access.bytes;) {
    const uint64_t address = access.address[lane] + done;
    const uint32_t count = piece_at(address, access.bytes - done);
    DefinedBytes* defined = definedness(warp, address);
    const uint64_t before =
        defined && access.kind != AccessKind::kStore ? defined->undefined(address, count) : 0;
    if (before) found_undefined(warp, access, lane, before);
    if (access.kind == AccessKind::kLoad) {
      if (before) leave_undefined(access, first + done, count, before);
    } else {
      require_defined(warp, access, lane, undefined_of(access, first + done, count));
      if (before) combined_undefined(warp, access, lane);
      if (defined) defined->set(address, count);
    }
    done += count;
  }
}

// What loads from device memory bring, and what stores leave there.
void Checker::follow_global(Warp& warp, const Access& access) {
  if (!memory_may_be_undefined_ && access.kind == AccessKind::kLoad) return;
  size_t first = 0;
  for_each_lane(access.mask, [&](int lane) {
    if (access.undefined) {
      complete_global(warp, access, lane, first);
      first += access.bytes;
    } else {
      follow_global_lane(warp, access, lane);
    }
  });
}

void Checker::read_global_cells(const Actor& actor, const Access& access) {
  GlobalMemory::Cursor pages(global_);
  pages.for_each_run(access.address, access.mask, [&](GlobalShadow& shadow, uint32_t run) {
    shadow.read_cells(actor, run, access.address, *this, [](int, uint64_t) {});
  });
}

void Checker::access_global(Warp& warp, const Access& access) {
  if (follow_values_) follow_global(warp, access);
  if (!order_accesses_) return;
  const Actor actor = actor_of(warp, access);
  if (reads_cells(access)) {
    read_global_cells(actor, access);
    return;
  }
  const bool writes = access.kind != AccessKind::kLoad;
  GlobalMemory::Cursor pages(global_);
  for_each_lane(access.mask, [&](int lane) {
    pages.for_each_page(
        access.address[lane], access.bytes,
        [&](GlobalShadow& shadow, uint32_t offset, uint32_t bytes) {
          if (!writes) {
            shadow.read(actor, lane, offset, bytes, *this);
          } else if (access.proxy == Proxy::kAsync && access.kind == AccessKind::kStore) {
            shadow.finish_write(actor, lane, offset, bytes, 0, *this);
          } else {
            shadow.write(actor, lane, offset, bytes, 0, *this);
          }
        });
  });
}

void Checker::access_local(Warp& warp, const Access& access) {
  if (!follow_values_) return;
  WarpState& state = state_of(warp);
  if (state.local_capacity < warp.local_capacity) {
    std::vector<bool> grown(size_t{warp.local_capacity} * kWarpSize);
    for (size_t lane = 0; lane < kWarpSize; ++lane) {
      for (size_t i = 0; i < state.local_capacity; ++i) {
        grown[lane * warp.local_capacity + i] =
            state.local_defined[lane * state.local_capacity + i];
      }
    }
    state.local_defined = std::move(grown);
    state.local_capacity = warp.local_capacity;
  }
  for_each_lane(access.mask, [&](int lane) {
    const auto first = static_cast<size_t>(access.host[lane] - warp.local.get());
    uint64_t undefined = access.kind == AccessKind::kLoad ? 0 : values_.stored(warp, lane);
    for (uint32_t i = 0; i < access.bytes; ++i) {
      if (access.kind == AccessKind::kLoad) {
        undefined |= uint64_t{!state.local_defined[first + i]} << (i & 63);
      } else {
        state.local_defined[first + i] = !(undefined >> (i & 63) & 1);
      }
    }
    if (access.kind == AccessKind::kLoad && undefined) {
      found_undefined(warp, access, lane, undefined);
    }
  });
}

void Checker::wgmma_completes(Warp& warp, const exec::WgmmaOperation& operation) {
  if (!follow_values_) return;
  Values::completed(warp, operation);
  // The operands were shown as accesses of the first warp.
  std::string& origin = state_of(warp).origin;
  if (origin.empty()) origin = state_of(*operation.parts[0].warp).origin;
}

void Checker::async_begins(Warp& warp, const Access& access) {
  if (!order_accesses_ && access.space == Space::kGlobal) return;
  const Actor actor = actor_of(warp, access);
  if (access.space == Space::kGlobal && reads_cells(access)) {
    read_global_cells(actor, access);
    return;
  }
  const AccessState flight =
      access.proxy == Proxy::kAsync ? AccessState::kAsyncFlight : AccessState::kCopyFlight;
  if (access.space == Space::kShared && copies_cells(access) && is_in_own_cta(warp, access)) {
    state_of(*warp.cta->cluster)
        .shared[warp.cta->rank]
        ->begin_write_cells(actor, access.mask, access.address, flight, *this);
    return;
  }
  GlobalMemory::Cursor pages(global_);
  for_each_lane(access.mask, [&](int lane) {
    auto begin = [&](auto& shadow, uint32_t offset, uint32_t bytes) {
      if (access.kind == AccessKind::kStore) {
        shadow.begin_write(actor, lane, offset, bytes, flight, *this);
      } else if (access.kind == AccessKind::kLoad) {
        if (access.space == Space::kShared) {
          shadow.begin_read(actor, lane, offset, bytes, *this);
        } else {
          shadow.read(actor, lane, offset, bytes, *this);
        }
      }
    };
    const uint64_t address = access.address[lane];
    if (access.space == Space::kShared) {
      begin(*state_of(*warp.cta->cluster).shared[address >> kSharedRankShift],
            static_cast<uint32_t>((address & kSharedOffsetMask) - kSharedBase), access.bytes);
    } else if (access.space == Space::kGlobal) {
      pages.for_each_page(address, access.bytes, begin);
    }
  });
}

std::unique_ptr<exec::Observer> make_checker(const exec::LaunchState& launch) {
  if (!launch.options->checks.need_checker()) return nullptr;
  return std::make_unique<Checker>(launch);
}

}  // namespace gpu_emulator::check
