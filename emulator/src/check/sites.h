#pragma once

// Places in the code by number, and sentences about them.

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../exec/cta.h"
#include "actor.h"

namespace gpu_emulator::check {

class Sites {
 public:
  explicit Sites(const exec::LaunchState& launch);

  uint32_t site(const exec::Function* function, uint32_t pc) const {
    const auto index = static_cast<size_t>(function - functions_);
    const uint32_t site = first_[index] + pc;
    return site < Record::kUnknownSite ? site : Record::kUnknownSite;
  }
  // "PTX line 12: st.shared.u32 [%r1], %r2; (kernel.cu:7)"
  std::string describe(uint32_t site) const;
  // "CTA (0,0,0), warp 1, lane 3"
  std::string describe_thread(uint64_t cluster, uint32_t agent, uint32_t lanes) const;

 private:
  const exec::LaunchState& launch_;
  const exec::Function* functions_;
  std::vector<uint32_t> first_;  // site of each function's first instruction
};

}  // namespace gpu_emulator::check
