// Clusters and the odds and ends of sm_90: barrier.cluster (PTX 9.7.13.4), mapa (9.7.9.23),
// getctarank (9.7.9.24), setmaxnreg (9.7.19.5), proxy fences (9.7.13.5).

#include "decode.h"
#include "function_decoder.h"
#include "hopper_state.h"
#include "register_limits.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

void tell(Warp& warp, SyncKind kind, uint32_t mask, Order order = Order::kWeak,
          Scope scope = Scope::kCluster, uint32_t id = 0) {
  if (Observer* observer = observer_of(warp)) {
    observer->synchronise(warp, {kind, mask, id, order, scope});
  }
}

// --------------------------------------------------------------------------------- barrier.cluster

bool all_arrived(Cluster& cluster) {
  const uint64_t generation = hopper(cluster).generation;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) {
      if (warp->done) continue;
      const HopperWarpState& state = hopper(*warp);
      if (warp->live & ~state.cluster_arrived) return false;
      for (uint32_t left = warp->live; left; left &= left - 1) {
        if (state.cluster_generation[first_lane(left)] != generation) return false;
      }
    }
  }
  return true;
}

void complete_if_all_arrived(Warp& warp) {
  Cluster& cluster = *warp.cta->cluster;
  if (!all_arrived(cluster)) return;
  ++hopper(cluster).generation;
  cluster.expired_waits = 0;
  tell(warp, SyncKind::kClusterComplete, kAllLanes);
}

Step run_cluster_arrive(Warp& warp, const Instruction& in, uint32_t mask) {
  if (options<ClusterBarrierOptions>(in).aligned)
    require_aligned(warp, mask, "barrier.cluster.arrive.aligned");
  HopperWarpState& state = hopper(warp);
  if (const uint32_t again = state.cluster_arrived & mask) {
    fail(warp, first_lane(again), ReportKind::kBarrier,
         "barrier.cluster.arrive again without barrier.cluster.wait.");
  }
  state.cluster_arrived |= mask;
  const uint64_t generation = hopper(*warp.cta->cluster).generation;
  for_each_lane(mask, [&](int lane) { state.cluster_generation[lane] = generation; });
  tell(warp, SyncKind::kClusterArrive, mask, in.order);
  complete_if_all_arrived(warp);
  return Step::kNext;
}

Step run_cluster_wait(Warp& warp, const Instruction& in, uint32_t mask) {
  if (options<ClusterBarrierOptions>(in).aligned)
    require_aligned(warp, mask, "barrier.cluster.wait.aligned");
  if (split_off(warp, mask)) return Step::kJump;
  HopperWarpState& state = hopper(warp);
  if (const uint32_t absent = mask & ~state.cluster_arrived) {
    fail(warp, first_lane(absent), ReportKind::kBarrier,
         "barrier.cluster.wait without barrier.cluster.arrive.");
  }
  const uint64_t generation = hopper(*warp.cta->cluster).generation;
  bool complete = true;
  for_each_lane(mask, [&](int lane) { complete &= state.cluster_generation[lane] < generation; });
  Wait& wait = warp.fragment().wait;
  wait = Wait();
  if (!complete) {
    wait.kind = Wait::Kind::kClusterBarrier;
    wait.generation = generation;
    return Step::kRetry;
  }
  state.cluster_arrived &= ~mask;
  tell(warp, SyncKind::kClusterWait, mask, in.order);
  return Step::kNext;
}

void decode_cluster_barrier(Decoder& decoder, Handler handler, Order order) {
  decoder.out.order = order;
  decoder.memory_order();
  make_options<ClusterBarrierOptions>(decoder.out).aligned = decoder.take("aligned");
  decoder.out.counter_class = InstructionClass::kBarrier;
  decoder.out.run = handler;
}
void decode_cluster_arrive(Decoder& decoder) {
  decode_cluster_barrier(decoder, run_cluster_arrive, Order::kRelease);
}
void decode_cluster_wait(Decoder& decoder) {
  decode_cluster_barrier(decoder, run_cluster_wait, Order::kAcquire);
}

// ----------------------------------------------------------------------------- mapa and getctarank

template <class T>
Step run_mapa(Warp& warp, const Instruction& in, uint32_t mask) {
  const T* a = warp.lanes<T>(in.a);
  const uint32_t* rank = warp.lanes<uint32_t>(in.b);
  T* d = warp.lanes<T>(in.d);
  constexpr T kRankBits = T{0xff} << kSharedRankShift;
  for_each_lane(mask, [&](int lane) {
    const size_t ctas = warp.cta->cluster->ctas.size();
    if (rank[lane] >= ctas) {
      fail(warp, lane, ReportKind::kInvalidOperand,
           format("mapa to CTA %u of a cluster of %zu.", rank[lane], ctas));
    }
    d[lane] = (a[lane] & ~kRankBits) | T{rank[lane]} << kSharedRankShift;
  });
  return Step::kNext;
}

template <class T>
Step run_getctarank(Warp& warp, const Instruction& in, uint32_t mask) {
  const T* a = warp.lanes<T>(in.a);
  uint32_t* d = warp.lanes<uint32_t>(in.d);
  for_each_lane(
      mask, [&](int lane) { d[lane] = static_cast<uint32_t>(a[lane] >> kSharedRankShift) & 0xff; });
  return Step::kNext;
}

void decode_mapa(Decoder& decoder) {
  decoder.take("shared::cluster");
  const bool wide = decoder.take("u64");
  if (!wide && !decoder.take("u32")) throw Unsupported("type");
  decoder.out.d = decoder.destination(0, wide ? 8 : 4);
  decoder.out.a = decoder.source(1, wide ? ptx::Type::kU64 : ptx::Type::kU32);
  decoder.out.b = decoder.source(2, ptx::Type::kU32);
  decoder.out.run = wide ? run_mapa<uint64_t> : run_mapa<uint32_t>;
  decoder.out.counter_class = InstructionClass::kInteger;
}

void decode_getctarank(Decoder& decoder) {
  decoder.take("shared::cluster");
  const bool wide = decoder.take("u64");
  if (!wide && !decoder.take("u32")) throw Unsupported("type");
  decoder.out.d = decoder.destination(0, 4);
  decoder.out.a = decoder.source(1, wide ? ptx::Type::kU64 : ptx::Type::kU32);
  decoder.out.run = wide ? run_getctarank<uint64_t> : run_getctarank<uint32_t>;
  decoder.out.counter_class = InstructionClass::kInteger;
}

// -------------------------------------------------------------------------------------- setmaxnreg

int launched_registers(const Warp& warp) {
  const LaunchState& launch = launch_of(warp);
  return register_limit(*launch.arch, *launch.entry,
                        static_cast<int>(launch.launch->threads_per_cta()));
}

// imm: registers.
Step run_setmaxnreg(Warp& warp, const Instruction& in, uint32_t mask) {
  require_converged(warp, mask, "setmaxnreg");
  HopperWarpState& state = hopper(warp);
  HopperCtaState& cta = hopper(*warp.cta);
  const int before = state.registers ? state.registers : launched_registers(warp);
  const int after = static_cast<int>(in.imm);
  const bool increases = options<RegisterCountOptions>(in).increases;
  if (increases ? after < before : after > before) {
    fail(warp, -1, ReportKind::kInvalidOperand,
         format("setmaxnreg.%s to %d registers: the thread has %d.", increases ? "inc" : "dec",
                after, before));
  }
  const int64_t more = int64_t{after - before} * kWarpSize;
  Wait& wait = warp.fragment().wait;
  wait = Wait();
  if (more > cta.register_pool) {
    wait.kind = Wait::Kind::kOther;
    wait.text = "setmaxnreg.inc: other warps have not released enough registers";
    return Step::kRetry;
  }
  std::vector<const Instruction*>& history = cta.setmaxnreg[warp.id / kWarpgroupWarps];
  if (state.setmaxnreg == history.size()) history.push_back(&in);
  if (history[state.setmaxnreg++] != &in) {
    fail(warp, -1, ReportKind::kDivergence,
         "The warps of a warpgroup execute different setmaxnreg.");
  }
  cta.register_pool -= more;
  state.registers = after;
  return Step::kNext;
}

void decode_setmaxnreg(Decoder& decoder) {
  const int action = decoder.take_any({"dec", "inc"});
  if (action < 0 || !decoder.take("sync") || !decoder.take("aligned") || !decoder.take("u32")) {
    throw Unsupported("modifiers");
  }
  decoder.out.imm = decoder.immediate(0);
  if (decoder.out.imm < 24 || decoder.out.imm > 256 || decoder.out.imm % 8) {
    throw Unsupported("register count: 24 to 256, a multiple of 8");
  }
  make_options<RegisterCountOptions>(decoder.out).increases = action == 1;
  decoder.out.counter_class = InstructionClass::kControl;
  decoder.out.run = run_setmaxnreg;
}

// ------------------------------------------------------------------------------------------ fences

// imm: SyncEvent::id
Step run_proxy_fence(Warp& warp, const Instruction& in, uint32_t mask) {
  tell(warp, SyncKind::kProxyFence, mask, in.order, in.scope, static_cast<uint32_t>(in.imm));
  return Step::kNext;
}

Step run_release_fence(Warp& warp, const Instruction& in, uint32_t mask) {
  tell(warp, SyncKind::kFence, mask, in.order, Scope::kCluster, 1);
  return Step::kNext;
}

Step run_nothing(Warp&, const Instruction&, uint32_t) { return Step::kNext; }

void decode_fence(Decoder& decoder, Handler handler) {
  decoder.memory_order();
  decoder.take_any({"sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
  decoder.out.counter_class = InstructionClass::kBarrier;
  decoder.out.run = handler;
}

void decode_async_fence(Decoder& decoder) {
  decoder.take_any({"global", "shared::cta", "shared::cluster"});
  decode_fence(decoder, run_proxy_fence);
}

void decode_tensormap_fence(Decoder& decoder) {
  decode_fence(decoder, run_proxy_fence);
  decoder.out.imm = 1;
}

void decode_alias_fence(Decoder& decoder) { decode_fence(decoder, run_nothing); }
void decode_restricted_fence(Decoder& decoder) {
  decoder.out.order = decoder.ast.modifiers[0] == "acquire" ? Order::kAcquire : Order::kRelease;
  decode_fence(decoder, run_release_fence);
}
void decode_init_fence(Decoder& decoder) { decode_fence(decoder, run_release_fence); }

constexpr Form kForms[] = {
    {"barrier.cluster.arrive", decode_cluster_arrive},
    {"barrier.cluster.wait", decode_cluster_wait},
    {"mapa", decode_mapa},
    {"getctarank", decode_getctarank},
    {"setmaxnreg", decode_setmaxnreg},
    {"fence.proxy.alias", decode_alias_fence},
    {"fence.proxy.async", decode_async_fence},
    {"fence.proxy.async.shared::cta", decode_async_fence},
    {"fence.proxy.async.shared::cluster", decode_async_fence},
    {"fence.proxy.async.global", decode_async_fence},
    {"fence.proxy.async::generic", decode_async_fence},
    {"fence.proxy.tensormap::generic", decode_tensormap_fence},
    {"fence.acquire.sync_restrict::shared::cluster", decode_restricted_fence},
    {"fence.release.sync_restrict::shared::cta", decode_restricted_fence},
    {"fence.mbarrier_init", decode_init_fence},
    {"membar.proxy.alias", decode_alias_fence},
    {"membar.proxy.async", decode_async_fence},
};

}  // namespace

void hopper_exited(Warp& warp) {
  // Threads that have exited count as arrived.
  if (warp.cta->cluster->hopper) complete_if_all_arrived(warp);
}

std::span<const Form> cluster_forms() { return kForms; }

}  // namespace gpu_emulator::exec
