#include "mbarrier.h"

namespace gpu_emulator::exec {

const char* Mbarrier::arrive(uint32_t count) {
  if (count == 0 || count > kMaxCount) return "its count must be from 1 to 2^20 - 1";
  if (count > pending_) return "more arrivals than this phase expects";
  pending_ -= count;
  return nullptr;
}

const char* Mbarrier::arrive_no_complete(uint32_t count) {
  if (count >= pending_) return ".noComplete would leave no arrival pending";
  return arrive(count);
}

const char* Mbarrier::drop(uint32_t count) {
  if (count > expected_) return "it drops more arrivals than phases expect";
  expected_ -= count;
  return nullptr;
}

const char* Mbarrier::add_arrival() {
  if (pending_ == kMaxCount) return "more than 2^20 - 1 arrivals pending";
  ++pending_;
  return nullptr;
}

const char* Mbarrier::expect(int64_t bytes) {
  transfer_ += bytes;
  return transfer_ > kMaxCount ? "its tx-count exceeds 2^20 - 1" : nullptr;
}

const char* Mbarrier::complete(int64_t bytes) {
  transfer_ -= bytes;
  return transfer_ < -int64_t{kMaxCount} ? "its tx-count falls below -(2^20 - 1)" : nullptr;
}

bool Mbarrier::end_phase() {
  if (pending_ != 0 || transfer_ != 0) return false;
  pending_ = expected_;
  ++phase_;
  return true;
}

}  // namespace gpu_emulator::exec
