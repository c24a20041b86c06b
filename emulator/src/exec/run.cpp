// A launch: checks its shape, runs its clusters on the host's threads, gathers counters.

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <mutex>
#include <thread>

#include "../check/checker.h"
#include "../device/device.h"
#include "../ptx/parser.h"
#include "launch_counters.h"
#include "report.h"
#include "scheduler.h"

namespace gpu_emulator {
namespace exec {
namespace {

[[noreturn]] void reject(const std::string& message) {
  throw Failure(ReportKind::kInvalidLaunch, message);
}

void check_block(const Arch& arch, const Function& entry, const Launch& launch) {
  uint64_t threads = 1;
  for (int i = 0; i < 3; ++i) {
    if (!launch.grid[i] || launch.grid[i] > static_cast<uint32_t>(arch.max_grid[i])) {
      reject(format("The grid's dimension %d is %u; the device allows 1 to %d.", i, launch.grid[i],
                    arch.max_grid[i]));
    }
    if (!launch.block[i] || launch.block[i] > static_cast<uint32_t>(arch.max_block[i])) {
      reject(format("The block's dimension %d is %u; the device allows 1 to %d.", i,
                    launch.block[i], arch.max_block[i]));
    }
    threads *= launch.block[i];
    if (entry.required_threads[i] &&
        static_cast<uint32_t>(entry.required_threads[i]) != launch.block[i]) {
      reject(format("Kernel %s must be launched with %d threads in dimension %d, not %u.",
                    entry.name.c_str(), entry.required_threads[i], i, launch.block[i]));
    }
  }
  if (threads > static_cast<uint64_t>(arch.max_threads_per_block)) {
    reject(format("A block has %llu threads; the device allows %d.",
                  static_cast<unsigned long long>(threads), arch.max_threads_per_block));
  }
  if (entry.max_threads[0]) {
    uint64_t most = 1;
    for (int i = 0; i < 3; ++i) most *= std::max(entry.max_threads[i], 1);
    if (threads > most) {
      reject(format("A block has %llu threads; kernel %s was compiled for at most %llu.",
                    static_cast<unsigned long long>(threads), entry.name.c_str(),
                    static_cast<unsigned long long>(most)));
    }
  }
}

void check_cluster(const Arch& arch, const LaunchState& state) {
  const auto& shape = state.cluster_shape;
  uint64_t ctas = 1;
  for (int i = 0; i < 3; ++i) {
    if (state.launch->grid[i] % shape[i]) {
      reject(format("The grid's dimension %d, %u, is no multiple of the cluster's, %u.", i,
                    state.launch->grid[i], shape[i]));
    }
    ctas *= shape[i];
  }
  if (ctas > static_cast<uint64_t>(arch.max_cluster)) {
    reject(format("A cluster of %llu blocks; the device allows %d.",
                  static_cast<unsigned long long>(ctas), arch.max_cluster));
  }
}

void check_launch(const Arch& arch, LaunchState& state) {
  const Launch& launch = *state.launch;
  const Function& entry = *state.entry;
  check_block(arch, entry, launch);
  for (int i = 0; i < 3; ++i) {
    const uint32_t wanted = launch.cluster[i] ? launch.cluster[i] : 1;
    const bool fixed = entry.cluster[i] > 0;
    state.cluster_shape[i] = fixed ? static_cast<uint32_t>(entry.cluster[i]) : wanted;
    if (fixed && launch.cluster[i] > 1 && launch.cluster[i] != state.cluster_shape[i]) {
      reject(format("Kernel %s was compiled for a cluster dimension of %d, not %u.",
                    entry.name.c_str(), entry.cluster[i], launch.cluster[i]));
    }
  }
  check_cluster(arch, state);
  const uint64_t shared = uint64_t{entry.shared_bytes} + launch.dynamic_shared_bytes;
  if (shared > static_cast<uint64_t>(arch.shared_per_block_optin)) {
    reject(format("A block needs %llu bytes of shared memory; the device allows %d.",
                  static_cast<unsigned long long>(shared), arch.shared_per_block_optin));
  }
  state.shared_bytes = static_cast<uint32_t>(shared);
  if (launch.params.size() < entry.param_bytes) {
    reject(format("Kernel %s takes %u bytes of parameters, not %zu.", entry.name.c_str(),
                  entry.param_bytes, launch.params.size()));
  }
}

// The grid's clusters, shared by the workers.
class Grid {
 public:
  Grid(LaunchState& launch, uint64_t clusters, int workers, uint64_t most_resident)
      : launch_(launch),
        clusters_(clusters),
        most_resident_(std::max<uint64_t>(1, most_resident / workers)) {}

  void work(Worker& worker) {
    std::fenv_t environment;  // kernels round to nearest and keep subnormals
    std::fegetenv(&environment);
    std::fesetenv(FE_DFL_ENV);
    try {
      run(worker);
    } catch (const Failure& failure) {
      record(failure.kind, failure.what());
    } catch (const std::exception& failure) {
      record(ReportKind::kInternal, failure.what());
    }
    std::fesetenv(&environment);
  }

  Report report() const { return report_; }

 private:
  // One cluster at a time. Where it takes long, it may wait for others through global memory: then
  // one more becomes resident, up to what the device could hold.
  void run(Worker& worker) {
    constexpr uint64_t kPatience = 300;  // turns
    std::vector<std::unique_ptr<Cluster>> resident;
    uint64_t turns = 0;
    while (!stop_) {
      const bool may_start =
          resident.empty() || (turns > kPatience && resident.size() < most_resident_);
      if (may_start) {
        const uint64_t index = next_.fetch_add(1);
        if (index < clusters_) resident.push_back(make_cluster(launch_, worker, index));
        turns = 0;
      }
      if (resident.empty()) return;
      ++turns;
      for (auto& cluster : resident) {
        if (!run_cluster(*cluster, worker)) {
          throw Failure(ReportKind::kDeadlock,
                        "Deadlock: no warp can go on." + describe_waits(*cluster));
        }
      }
      std::erase_if(resident, [](const auto& cluster) { return cluster->done; });
    }
  }

  void record(ReportKind kind, const std::string& text) {
    const std::lock_guard lock(mutex_);
    if (report_.text.empty()) report_ = report_of(kind, text);
    stop_ = true;
  }

  LaunchState& launch_;
  const uint64_t clusters_;
  const uint64_t most_resident_;
  std::atomic<uint64_t> next_ = 0;
  std::atomic<bool> stop_ = false;
  std::mutex mutex_;
  Report report_;
};

int worker_count(const Options& options, uint64_t clusters) {
  const int wanted =
      options.threads > 0 ? options.threads : static_cast<int>(std::thread::hardware_concurrency());
  return static_cast<int>(std::clamp<uint64_t>(std::max(wanted, 1), 1, clusters));
}

std::vector<Worker> make_workers(LaunchState& state, int count) {
  std::vector<Worker> workers(count);
  for (Worker& worker : workers) {
    worker.launch = &state;
    worker.count = state.options->count;
    if (!worker.count) continue;
    for (const Function& function : state.launch->program->functions) {
      worker.counters.emplace_back(function.code.size());
    }
  }
  return workers;
}

Report run_grid(LaunchState& state, Counters* counters) {
  const auto& grid_shape = state.launch->grid;
  uint64_t clusters = 1;
  for (int i = 0; i < 3; ++i) clusters *= grid_shape[i] / state.cluster_shape[i];
  const uint64_t per_cluster =
      state.cluster_shape[0] * state.cluster_shape[1] * state.cluster_shape[2];
  const uint64_t resident =
      uint64_t(std::max(occupancy_of(state).ctas_per_sm, 1)) * state.arch->sm_count / per_cluster;
  const int count = worker_count(*state.options, clusters);
  std::vector<Worker> workers = make_workers(state, count);
  Grid grid(state, clusters, count, resident);
  std::vector<std::thread> threads;
  for (int i = 1; i < count; ++i) threads.emplace_back([&, i] { grid.work(workers[i]); });
  grid.work(workers[0]);
  for (std::thread& thread : threads) thread.join();
  if (counters && state.options->count) {
    add_counters(state, workers, counters);
  }
  return grid.report();
}

}  // namespace
}  // namespace exec

namespace {

// The module with other texts in place of some lines of its own.
std::unique_ptr<exec::Program> with_lines(const exec::Program& program,
                                          const std::map<int, std::string>& replaced) {
  std::string text;
  for (size_t i = 0; i < program.source_lines->size(); ++i) {
    const auto other = replaced.find(static_cast<int>(i) + 1);
    text += (other == replaced.end() ? (*program.source_lines)[i] : other->second) + "\n";
  }
  return exec::decode(ptx::parse(text));
}

}  // namespace

Report run(const Arch& arch, const Options& options, const MemoryMap& memory, const Launch& launch,
           Counters* counters) {
  const exec::Function& function = launch.program->functions.at(launch.function);
  const bool is_meant = options.delete_in.empty() || options.delete_in == function.name;
  if (!options.replaced_lines.empty() && is_meant) {
    Options whole = options;
    whole.replaced_lines.clear();
    try {
      const auto program = with_lines(*launch.program, options.replaced_lines);
      Launch changed = launch;
      changed.program = program.get();
      return run(arch, whole, memory, changed, counters);
    } catch (const ptx::ParseError& error) {
      return exec::report_of(exec::ReportKind::kInvalidLaunch, error.what());
    }
  }
  exec::LaunchState state;
  state.arch = &arch;
  state.options = &options;
  state.memory = &memory;
  state.launch = &launch;
  state.entry = &function;
  try {
    exec::check_launch(arch, state);
    if (!options.checks.follow_values()) memory.assume_defined();
    const auto checks = check::make_checker(state);
    state.observer = checks.get();
    return exec::run_grid(state, counters);
  } catch (const exec::Failure& failure) {
    return exec::report_of(failure.kind, failure.what());
  }
}

}  // namespace gpu_emulator
