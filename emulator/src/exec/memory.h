#pragma once

// The one way from PTX addresses to bytes: spaces and generic windows, bounds, alignment, counters
// and the observer's hook. Loads, stores, atomics, ldmatrix, asynchronous copies all come here.
//
// Generic addresses: global memory as it is (host addresses are canonical); shared, local and param
// windows in the non-canonical high bits.

#include <cstdint>

#include "cta.h"
#include "observer.h"
#include "warp.h"

namespace gpu_emulator::exec {

inline constexpr uint64_t kSharedWindow = 0x40ull << 56;
inline constexpr uint64_t kLocalWindow = 0x41ull << 56;
inline constexpr uint64_t kParamWindow = 0x42ull << 56;
inline constexpr uint64_t kFunctionWindow = 0x43ull << 56;  // "addresses" of functions
inline constexpr uint64_t kWindowMask = 0xffull << 56;

// Local addresses begin here, so that they differ from offsets in the parameter block.
inline constexpr uint64_t kLocalBase = 1u << 24;

Space space_of_generic(uint64_t address);

struct AccessForm {  // what is the same for all lanes
  Space space = Space::kGeneric;
  AccessKind kind = AccessKind::kLoad;
  Proxy proxy = Proxy::kGeneric;
  Order order = Order::kWeak;
  Scope scope = Scope::kNone;
  uint32_t bytes = 0;      // a lane
  uint32_t alignment = 1;  // power of two
  bool counted = true;
  bool announce_only = false;  // Observer::async_begins() instead of access()
  bool shown = true;           // to the observer
};

// Host pointers of the lanes of mask: host[lane]. Fails with a report on a bad address. Shows the
// access to counters and observer.
void resolve(Warp& warp, const AccessForm& form, uint32_t mask, const uint64_t* address,
             std::byte** host);

// As resolve, of one address on behalf of one lane (bulk copies, tensor maps), of any size.
std::byte* resolve_one(Warp& warp, const AccessForm& form, int lane, uint64_t address);

// Lanes' addresses of an instruction with operand `slot` (32 or 64 bits) and its offset.
inline void addresses(const Warp& warp, Slot slot, bool wide, int64_t offset, uint64_t* out) {
  if (wide) {
    const uint64_t* base = warp.lanes<uint64_t>(slot);
    for (int i = 0; i < kWarpSize; ++i) out[i] = base[i] + static_cast<uint64_t>(offset);
  } else {
    const uint32_t* base = warp.lanes<uint32_t>(slot);
    const auto add = static_cast<uint32_t>(offset);
    for (int i = 0; i < kWarpSize; ++i) out[i] = base[i] + add;
  }
}

}  // namespace gpu_emulator::exec
