#include "device.h"

#include <algorithm>
#include <mutex>

namespace gpu_emulator {

const Arch& a100() {
  static const Arch arch = {.name = "NVIDIA A100-SXM4-80GB (emulated)",
                            .major = 8,
                            .minor = 0,
                            .has_sm90a = false,
                            .sm_count = 108,
                            .max_threads_per_block = 1024,
                            .max_threads_per_sm = 2048,
                            .max_blocks_per_sm = 32,
                            .registers_per_sm = 65536,
                            .registers_per_block = 65536,
                            .shared_per_block = 48 * 1024,
                            .shared_per_block_optin = 163 * 1024,
                            .shared_per_sm = 164 * 1024,
                            .reserved_shared_per_block = 1024,
                            .max_cluster = 1,
                            .l2_bytes = 40 * 1024 * 1024,
                            .max_block = {1024, 1024, 64},
                            .max_grid = {2147483647, 65535, 65535}};
  return arch;
}

const Arch& h100() {
  static const Arch arch = {.name = "NVIDIA H100 80GB HBM3 (emulated)",
                            .major = 9,
                            .minor = 0,
                            .has_sm90a = true,
                            .sm_count = 132,
                            .max_threads_per_block = 1024,
                            .max_threads_per_sm = 2048,
                            .max_blocks_per_sm = 32,
                            .registers_per_sm = 65536,
                            .registers_per_block = 65536,
                            .shared_per_block = 48 * 1024,
                            .shared_per_block_optin = 227 * 1024,
                            .shared_per_sm = 228 * 1024,
                            .reserved_shared_per_block = 1024,
                            .max_cluster = 16,
                            .l2_bytes = 50 * 1024 * 1024,
                            .max_block = {1024, 1024, 64},
                            .max_grid = {2147483647, 65535, 65535}};
  return arch;
}

void MemoryMap::add(const Range& range) {
  const std::unique_lock lock(mutex_);
  ranges_[range.begin] = range;
}

bool MemoryMap::remove(uint64_t begin) {
  const std::unique_lock lock(mutex_);
  return ranges_.erase(begin) > 0;
}

const MemoryMap::Range* MemoryMap::find(uint64_t address) const {
  const std::shared_lock lock(mutex_);
  auto next = ranges_.upper_bound(address);
  if (next == ranges_.begin()) return nullptr;
  const Range& range = std::prev(next)->second;
  return address < range.end ? &range : nullptr;
}

bool MemoryMap::holds_undefined() const {
  const std::shared_lock lock(mutex_);
  return std::any_of(ranges_.begin(), ranges_.end(), [](const auto& entry) {
    return entry.second.defined && !entry.second.defined->all();
  });
}

void MemoryMap::assume_defined() const {
  const std::shared_lock lock(mutex_);
  for (const auto& [begin, range] : ranges_) {
    if (range.defined && range.writable) range.defined->set_all();
  }
}

}  // namespace gpu_emulator
