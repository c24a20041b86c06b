#include "sites.h"

#include <algorithm>

#include "../exec/report.h"

namespace gpu_emulator::check {

using exec::format;

Sites::Sites(const exec::LaunchState& launch)
    : launch_(launch), functions_(launch.launch->program->functions.data()) {
  // The entry comes first, so that its places have numbers however large the module is.
  const auto& functions = launch.launch->program->functions;
  first_.resize(functions.size());
  const auto entry = static_cast<size_t>(launch.entry - functions_);
  auto next = static_cast<uint32_t>(launch.entry->code.size()) + 1;
  for (size_t i = 0; i < functions.size(); ++i) {
    if (i == entry) continue;
    first_[i] = std::min(next, Record::kUnknownSite);
    next = first_[i] + static_cast<uint32_t>(functions[i].code.size()) + 1;
  }
}

std::string Sites::describe(uint32_t site) const {
  const auto& program = *launch_.launch->program;
  for (size_t i = 0; i < first_.size(); ++i) {
    const exec::Function& function = program.functions[i];
    if (site < first_[i] || site - first_[i] >= function.code.size()) continue;
    return exec::describe_place(program, function, site - first_[i]);
  }
  return "an unknown place";
}

std::string Sites::describe_thread(uint64_t cluster, uint32_t agent, uint32_t lanes) const {
  const auto& grid = launch_.launch->grid;
  const auto& shape = launch_.cluster_shape;
  const auto& block = launch_.launch->block;
  const uint32_t warps = (block[0] * block[1] * block[2] + exec::kWarpSize - 1) / exec::kWarpSize;
  uint64_t rank = agent / warps;
  uint32_t id[3];
  for (int i = 0; i < 3; ++i) {
    const uint32_t clusters = grid[i] / shape[i];
    id[i] = static_cast<uint32_t>(cluster % clusters * shape[i] + rank % shape[i]);
    cluster /= clusters;
    rank /= shape[i];
  }
  std::string text = format("CTA (%u,%u,%u), warp %u", id[0], id[1], id[2], agent % warps);
  if (lanes == ~0u) return text;
  if (__builtin_popcount(lanes) == 1) return text + format(", lane %d", __builtin_ctz(lanes));
  return text + format(", lanes 0x%08x", lanes);
}

}  // namespace gpu_emulator::check
