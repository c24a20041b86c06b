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
  // Pages one after the other, each under the lock of its shard.
  class Cursor {
   public:
    explicit Cursor(GlobalMemory& memory) : memory_(memory) {}

    // Calls f(shadow of the page, offset in it, bytes) for each piece of the range.
    template <class F>
    void for_each_page(uint64_t address, uint64_t bytes, F&& f) {
      while (bytes) {
        const uint64_t offset = address % kPageBytes;
        const uint64_t piece = bytes < kPageBytes - offset ? bytes : kPageBytes - offset;
        if (!shadow_ || address / kPageBytes != page_) move(address / kPageBytes);
        f(*shadow_, static_cast<uint32_t>(offset), static_cast<uint32_t>(piece));
        address += piece;
        bytes -= piece;
      }
    }

    // Whole cells, one of each lane of mask: calls f(shadow of the page, lanes) for each run of
    // lanes in one page, in the order of the lanes.
    template <class F>
    void for_each_run(const uint64_t* address, uint32_t mask, F&& f) {
      while (mask) {
        const uint64_t page = address[exec::first_lane(mask)] / kPageBytes;
        uint32_t run = 0;
        for (uint32_t left = mask; left; left &= left - 1) {
          if (address[exec::first_lane(left)] / kPageBytes != page) break;
          run |= left & -left;
        }
        if (!shadow_ || page != page_) move(page);
        f(*shadow_, run);
        mask &= ~run;
      }
    }

   private:
    void move(uint64_t page) {
      Shard& shard = memory_.shards_[page % kShards];
      if (lock_) lock_.unlock();  // never two at once
      lock_ = std::unique_lock(shard.mutex);
      auto& shadow = shard.pages[page];
      if (!shadow) {
        shadow = std::make_unique<GlobalShadow>(exec::Space::kGlobal, page * kPageBytes,
                                                static_cast<uint32_t>(kPageBytes), false);
      }
      page_ = page;
      shadow_ = shadow.get();
    }

    GlobalMemory& memory_;
    std::unique_lock<std::mutex> lock_;
    uint64_t page_ = 0;
    GlobalShadow* shadow_ = nullptr;
  };

 private:
  static constexpr uint64_t kPageBytes = 4096, kShards = 64;
  struct Shard {
    std::mutex mutex;
    std::unordered_map<uint64_t, std::unique_ptr<GlobalShadow>> pages;
  };
  std::array<Shard, kShards> shards_;
};

}  // namespace gpu_emulator::check
