#pragma once

// Shadow of global memory for one launch: pages made when first touched, shared by the host threads
// that run its clusters.

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "state.h"

namespace gpu_emulator::check {

class GlobalMemory {
 public:
  // Calls f(shadow of the page, offset in it, bytes) for each piece of the range, under its lock.
  template <class F>
  void for_each_page(uint64_t address, uint64_t bytes, F&& f) {
    while (bytes) {
      const uint64_t page = address / kPageBytes, offset = address % kPageBytes;
      const uint64_t piece = bytes < kPageBytes - offset ? bytes : kPageBytes - offset;
      Shard& shard = shards_[page % kShards];
      const std::lock_guard lock(shard.mutex);
      auto& shadow = shard.pages[page];
      if (!shadow) {
        shadow = std::make_unique<GlobalShadow>(exec::Space::kGlobal, page * kPageBytes,
                                                static_cast<uint32_t>(kPageBytes), false);
      }
      f(*shadow, static_cast<uint32_t>(offset), static_cast<uint32_t>(piece));
      address += piece;
      bytes -= piece;
    }
  }

 private:
  static constexpr uint64_t kPageBytes = 4096, kShards = 64;
  struct Shard {
    std::mutex mutex;
    std::unordered_map<uint64_t, std::unique_ptr<GlobalShadow>> pages;
  };
  std::array<Shard, kShards> shards_;
};

}  // namespace gpu_emulator::check
