#pragma once

// mbarrier objects (PTX 9.7.13.15). The object's state lies beside shared memory; its 8 bytes hold
// a signature, by which overwriting them is noticed.

#include <cstdint>

#include "observer.h"

namespace gpu_emulator::exec {

struct Warp;
struct Cta;

class Mbarrier {
 public:
  static constexpr uint32_t kMaxCount = (1u << 20) - 1;

  explicit Mbarrier(uint32_t count) : expected_(count), pending_(count) {}

  // Each returns the rule that the operation breaks, as the end of a sentence, or nullptr. Phases
  // end only in end_phase().
  const char* arrive(uint32_t count);
  const char* arrive_no_complete(uint32_t count);
  const char* drop(uint32_t count);     // before the arrival of arrive_drop
  const char* add_arrival();            // cp.async.mbarrier.arrive without .noinc
  const char* expect(int64_t bytes);    // expect_tx
  const char* complete(int64_t bytes);  // complete_tx

  bool end_phase();  // if nothing is pending; whether it did

  uint64_t phase() const { return phase_; }
  uint32_t pending() const { return pending_; }
  uint32_t expected() const { return expected_; }
  int64_t transfer() const { return transfer_; }

  // The opaque 64 bits that arrive returns: the phase and the arrivals pending before it.
  uint64_t state() const { return phase_ << 20 | pending_; }
  static uint32_t pending_of(uint64_t state) { return state & kMaxCount; }
  static uint64_t phase_of(uint64_t state) { return state >> 20; }

 private:
  uint32_t expected_, pending_;
  int64_t transfer_ = 0;  // bytes; below zero while completions are ahead of expect_tx
  uint64_t phase_ = 0;
};

// The mbarrier at a shared address; fails on behalf of the lane if there is none.
Mbarrier& mbarrier_at(Warp& warp, int lane, uint64_t address);

// complete_tx by an asynchronous operation of this proxy that the lane issued.
void complete_transfer(Warp& warp, int lane, uint64_t address, uint32_t bytes, Proxy proxy);

}  // namespace gpu_emulator::exec
