#pragma once

// What asynchronous operations share: where they were issued, and the observer's view of the bytes
// they touch.

#include <cstdint>
#include <vector>

#include "memory.h"
#include "warp.h"

namespace gpu_emulator::exec {

// An instruction executed by a lane; reports of what it does later name it.
struct IssueSite {
  Warp* warp = nullptr;
  const Function* function = nullptr;
  uint32_t pc = 0;
  int lane = 0;
};
IssueSite issue_site(Warp& warp, int lane);

// Runs f() as if the warp were still at the site.
template <class F>
void at_site(const IssueSite& site, F&& f) {
  struct Restore {
    Warp& warp;
    const Function* function;
    uint32_t pc;
    ~Restore() {
      warp.function = function;
      warp.pc = pc;
    }
  } restore{*site.warp, site.warp->function, site.warp->pc};
  site.warp->function = site.function;
  site.warp->pc = site.pc;
  f();
}

// Ranges of the same size in one space.
struct AsyncRanges {
  Space space = Space::kGlobal;
  AccessKind kind = AccessKind::kLoad;
  Proxy proxy = Proxy::kAsync;
  uint32_t bytes = 0;  // of each
  std::vector<uint64_t> address;
  std::vector<std::byte*> host;
};

// Host addresses of the ranges; fails where one is not valid. Shows nothing.
void resolve_ranges(Warp& warp, int lane, AsyncRanges& ranges);

enum class Moment : uint8_t { kIssue, kCompletion };
// undefined: Access::undefined of all ranges, one after the other.
void show_ranges(Warp& warp, int lane, const AsyncRanges& ranges, Moment moment,
                 std::vector<std::byte>* undefined = nullptr);

// Whether an asynchronous operation of this cluster is left for later: never in eager mode, always
// in late mode.
bool defers(Cluster& cluster);

// Adds bytes that an asynchronous copy moves to the counters of the current instruction.
void count_bytes(Warp& warp, uint64_t bytes);

// Addresses in .shared of the lanes of mask, of an operand in .shared or generic addressing;
// `what` for the report of a generic address that is not shared.
void shared_addresses(Warp& warp, const Instruction& in, uint32_t mask, uint64_t* address,
                      const char* what);

}  // namespace gpu_emulator::exec
