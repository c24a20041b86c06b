// Making clusters, their turns, and the report of a deadlock.

#include <algorithm>
#include <cstring>

#include "async.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator::exec {
namespace {

constexpr uint64_t kQuantum = 20000;

std::unique_ptr<Warp> make_warp(Cta& cta, Worker& worker, uint32_t id, uint32_t threads) {
  auto warp = std::make_unique<Warp>();
  warp->cta = &cta;
  warp->worker = &worker;
  warp->id = id;
  warp->live = threads >= kWarpSize ? kAllLanes : (1u << threads) - 1;
  warp->copy_groups.fill(0);
  warp->function = worker.launch->entry;
  Fragment root;
  root.mask = warp->live;
  root.frame = new_frame(*warp, *worker.launch->entry, 0);
  warp->fragments.push_back(root);
  return warp;
}

std::unique_ptr<Cta> make_cta(Cluster& cluster, Worker& worker, uint32_t rank) {
  LaunchState& launch = *cluster.launch;
  const auto& shape = launch.cluster_shape;
  auto cta = std::make_unique<Cta>();
  cta->cluster = &cluster;
  cta->rank = rank;
  cta->rank_xyz = {rank % shape[0], rank / shape[0] % shape[1], rank / shape[0] / shape[1]};
  for (int i = 0; i < 3; ++i) cta->id[i] = cluster.id[i] * shape[i] + cta->rank_xyz[i];
  cta->shared_bytes = launch.shared_bytes;
  cta->shared = allocate_aligned(std::max<size_t>(launch.shared_bytes, 1));
  std::memset(cta->shared.get(), kPoison, launch.shared_bytes);
  const uint32_t threads = launch.launch->threads_per_cta();
  for (uint32_t first = 0; first < threads; first += kWarpSize) {
    cta->warps.push_back(make_warp(*cta, worker, first / kWarpSize, threads - first));
  }
  return cta;
}

bool run_cta_warp(Warp& warp, uint64_t quantum) {
  if (warp.done) return false;
  const bool progress = run_warp(warp, quantum);
  if (warp.done) {
    complete_copies(warp, kAllLanes, 0);  // those of a warp that has exited still land
    if (Observer* observer = observer_of(warp)) {
      observer->synchronise(warp, {SyncKind::kExit, kAllLanes, 0, Order::kWeak, Scope::kNone});
    }
    for (size_t i = 0; i < warp.frames.size(); ++i) {
      if (warp.frames[i].function) free_frame(warp, static_cast<int>(i));
    }
  }
  return progress;
}

bool all_done(const Cluster& cluster) {
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) {
      if (!warp->done) return false;
    }
  }
  return true;
}

bool complete_pending(Cluster& cluster) {
  if (cluster.pending.empty()) return false;
  const bool shuffled = cluster.launch->options->mode == Mode::kRandom;
  const size_t index = shuffled ? cluster.random() % cluster.pending.size() : 0;
  AsyncOperation operation = std::move(cluster.pending[index]);
  cluster.pending.erase(cluster.pending.begin() + static_cast<std::ptrdiff_t>(index));
  operation.complete();
  return true;
}

// Warps in random order, some of them not at all, for random quanta.
bool run_shuffled(Cluster& cluster) {
  std::vector<Warp*> warps;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) warps.push_back(warp.get());
  }
  std::shuffle(warps.begin(), warps.end(), cluster.random);
  bool progress = false;
  for (Warp* warp : warps) {
    if (!warp->done && cluster.random() % 4 == 0) {
      progress = true;  // skipped: nothing is known about it
      continue;
    }
    progress |= run_cta_warp(*warp, 50 + cluster.random() % 2000);
  }
  if (cluster.random() % 8 == 0) progress |= complete_pending(cluster);
  return progress;
}

bool run_in_order(Cluster& cluster) {
  bool progress = false;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) progress |= run_cta_warp(*warp, kQuantum);
  }
  return progress;
}

bool release_all(Cluster& cluster) {
  bool any = false;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) {
      if (!warp->done) any |= release_joining(*warp);
    }
  }
  return any;
}

// Waits for mbarriers give up where nothing else can go on: a kernel may look at one before it does
// what completes it. One that only looks again and again is stuck.
bool expire_waits(Cluster& cluster) {
  constexpr uint32_t kMost = 1000;
  if (++cluster.expired_waits > kMost) return false;
  bool any = false;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) {
      for (Fragment& fragment : warp->fragments) {
        if (fragment.state != Fragment::State::kRunnable || warp->done) continue;
        if (fragment.wait.kind == Wait::Kind::kMbarrier) any = fragment.wait.expired = true;
      }
    }
  }
  return any;
}

// "warps 0, 1 (twice), 2"
std::string describe_arrivals(const std::array<uint32_t, NamedBarrier::kMaxWarps>& arrivals) {
  std::string text;
  for (size_t i = 0; i < arrivals.size(); ++i) {
    if (!arrivals[i]) continue;
    text += format(text.empty() ? "warps %zu" : ", %zu", i);
    if (arrivals[i] == 2) text += " (twice)";
    if (arrivals[i] > 2) text += format(" (%u times)", arrivals[i]);
  }
  return text;
}

std::string describe_barrier(const Cta& cta, const Wait& wait) {
  const NamedBarrier& barrier = cta.barriers[wait.id];
  if (wait.generation == kNotArrived) return "not all lanes of this warp have come";
  const NamedBarrier::Phase& phase = barrier.phase;
  uint32_t threads = phase.threads, expected = phase.expected;
  if (phase.whole_cta) {
    expected = cta.live_threads();
    threads = 0;
    for (const auto& warp : cta.warps) {
      if (phase.arrivals[warp->id])
        threads += static_cast<uint32_t>(__builtin_popcount(warp->live));
    }
  }
  std::string text = format("%u threads of %u have arrived: ", threads, expected) +
                     describe_arrivals(phase.arrivals);
  const auto& before = barrier.previous_arrivals;
  const bool repeated = std::any_of(before.begin(), before.end(), [](uint32_t n) { return n > 1; });
  if (repeated) text += "; in the phase before, " + describe_arrivals(before);
  return text;
}

std::string describe_wait(const Cta& cta, const Fragment& fragment) {
  const Wait& wait = fragment.wait;
  switch (wait.kind) {
    case Wait::Kind::kNone:
      return "can go on";
    case Wait::Kind::kBarrier: {
      return format("waits at barrier %u: ", wait.id) + describe_barrier(cta, wait);
    }
    case Wait::Kind::kWarpSync:
      return format("waits in %s for the lanes 0x%08x", wait.text, wait.id);
    case Wait::Kind::kClusterBarrier:
      return "waits at barrier.cluster";
    case Wait::Kind::kMbarrier:
      return format("waits for phase %llu of the mbarrier at 0x%x%s%s",
                    static_cast<unsigned long long>(wait.generation), wait.id,
                    wait.text[0] ? ": " : "", wait.text);
    case Wait::Kind::kWarpgroup:
      return "waits for the other warps of its warpgroup";
    case Wait::Kind::kOther:
      return std::string("waits: ") + wait.text;
  }
  return "";
}

}  // namespace

uint32_t Cta::live_threads() const {
  uint32_t threads = 0;
  for (const auto& warp : warps) {
    if (!warp->done) threads += static_cast<uint32_t>(__builtin_popcount(warp->live));
  }
  return threads;
}

void Cluster::submit(AsyncOperation operation) {
  if (defers(*this)) {
    pending.push_back(std::move(operation));
  } else {
    operation.complete();
  }
}

std::unique_ptr<Cluster> make_cluster(LaunchState& launch, Worker& worker, uint64_t index) {
  auto cluster = std::make_unique<Cluster>();
  cluster->launch = &launch;
  cluster->index = index;
  const auto& shape = launch.cluster_shape;
  std::array<uint64_t, 3> count;
  for (int i = 0; i < 3; ++i) count[i] = launch.launch->grid[i] / shape[i];
  cluster->id = {static_cast<uint32_t>(index % count[0]),
                 static_cast<uint32_t>(index / count[0] % count[1]),
                 static_cast<uint32_t>(index / count[0] / count[1])};
  cluster->random.seed(launch.options->seed * 0x9e3779b97f4a7c15u + index);
  const uint32_t ctas = shape[0] * shape[1] * shape[2];
  // Warps ask for the size of the cluster when they are made.
  cluster->ctas.resize(ctas);
  for (uint32_t rank = 0; rank < ctas; ++rank) {
    cluster->ctas[rank] = make_cta(*cluster, worker, rank);
  }
  if (launch.observer) launch.observer->cluster_begins(*cluster);
  return cluster;
}

bool run_cluster(Cluster& cluster, Worker& worker) {
  worker.global = RangeCache();  // ranges may have changed since the last turn
  const bool shuffled = cluster.launch->options->mode == Mode::kRandom;
  const bool progress = shuffled ? run_shuffled(cluster) : run_in_order(cluster);
  if (all_done(cluster)) {
    while (!cluster.pending.empty()) {
      if (cluster.pending.front().abandon) cluster.pending.front().abandon();
      complete_pending(cluster);
    }
    cluster.done = true;
    if (cluster.launch->observer) cluster.launch->observer->cluster_ends(cluster);
    return true;
  }
  return progress || complete_pending(cluster) || release_all(cluster) || expire_waits(cluster);
}

std::string describe_waits(const Cluster& cluster) {
  constexpr int kMostShown = 40;
  std::string text;
  int shown = 0;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) {
      if (warp->done) continue;
      for (const Fragment& fragment : warp->fragments) {
        if (fragment.state != Fragment::State::kRunnable || shown++ >= kMostShown) continue;
        Warp at;  // a view of the warp at this fragment, for where()
        at.cta = warp->cta;
        at.id = warp->id;
        at.pc = fragment.pc;
        at.function = warp->frames[fragment.frame].function;
        text += format("\n  lanes 0x%08x ", fragment.mask) + describe_wait(*cta, fragment) + "; " +
                where(at, -1);
      }
    }
  }
  if (shown > kMostShown) text += format("\n  and %d more", shown - kMostShown);
  return text;
}

}  // namespace gpu_emulator::exec
