#include "device.h"

#include <algorithm>
#include <mutex>
#include <string>

namespace gpu_emulator {

namespace {

// What all have in common; the rest is an A100's.
Arch board(const char* name, int major, int minor, int sm_count, int l2_mib) {
  return {.name = std::string("NVIDIA ") + name + " (emulated)",
          .major = major,
          .minor = minor,
          .has_sm90a = false,
          .sm_count = sm_count,
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
          .l2_bytes = l2_mib * 1024 * 1024,
          .max_block = {1024, 1024, 64},
          .max_grid = {2147483647, 65535, 65535}};
}

Arch with_sm90a(Arch arch) {
  arch.has_sm90a = true;
  arch.shared_per_block_optin = 227 * 1024;
  arch.shared_per_sm = 228 * 1024;
  arch.max_cluster = 16;
  return arch;
}

// Compute capabilities 8.6, 8.9 and 12.0.
Arch smaller(Arch arch, int blocks_per_sm) {
  arch.max_threads_per_sm = 1536;
  arch.max_blocks_per_sm = blocks_per_sm;
  arch.shared_per_block_optin = 99 * 1024;
  arch.shared_per_sm = 100 * 1024;
  return arch;
}

}  // namespace

const std::array<Arch, kBoards>& boards() {
  static const std::array<Arch, kBoards> all = {
      board("A100-SXM4-80GB", 8, 0, 108, 40),
      with_sm90a(board("H100 80GB HBM3", 9, 0, 132, 50)),
      smaller(board("GeForce RTX 3090", 8, 6, 82, 6), 16),
      smaller(board("GeForce RTX 4090", 8, 9, 128, 72), 24),
      smaller(board("GeForce RTX 5090", 12, 0, 170, 96), 24),
  };
  return all;
}

const Arch& a100() { return boards()[0]; }
const Arch& h100() { return boards()[1]; }

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
