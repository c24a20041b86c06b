#pragma once

// What checks see of an execution. Every access of every kind goes through memory.h, which tells
// the observer; synchronisation tells it who has seen whom. A launch without checks has none.
// Implementations override what they need; calls come from several host threads at once (one
// cluster never from two).

#include <cstddef>
#include <cstdint>

#include "program.h"

namespace gpu_emulator::exec {

struct Cta;
struct Cluster;

enum class AccessKind : uint8_t { kLoad, kStore, kAtomic };
enum class Proxy : uint8_t {
  kGeneric,
  kCopy,   // cp.async: its write is seen after the wait of the issuing thread
  kAsync,  // TMA, bulk copies, wgmma operands
  kTensorMap,
};

struct Access {                  // of up to 32 lanes to one space
  Space space = Space::kGlobal;  // never generic
  AccessKind kind = AccessKind::kLoad;
  Proxy proxy = Proxy::kGeneric;
  Order order = Order::kWeak;
  Scope scope = Scope::kNone;
  uint32_t bytes = 0;  // a lane
  uint32_t mask = 0;
  const uint64_t* address = nullptr;  // [32]; shared: rank << 24 | offset with kSharedBase
  std::byte* const* host = nullptr;   // [32]
};

enum class SyncKind : uint8_t {
  kBarrierArrive,    // id: barrier of the CTA; before it counts
  kBarrierComplete,  // id; all warps that arrived may go on
  kBarrierLeave,     // id; this warp goes on
  kWarpSync,         // mask: lanes that now see each other's writes
  kFence,            // membar, fence: order and scope
  kProxyFence,       // fence.proxy.async and relatives
  kMbarrierArrive,   // id: shared address
  kMbarrierWait,     // id: a successful wait
  kClusterArrive,
  kClusterWait,
  kCopyWait,  // cp.async.wait_*: of the lanes of mask; completed copies were shown before
  kExit,
};

struct SyncEvent {
  SyncKind kind;
  uint32_t mask = 0;
  uint32_t id = 0;
  Order order = Order::kWeak;
  Scope scope = Scope::kNone;
};

class Observer {
 public:
  virtual ~Observer() = default;

  virtual void cluster_begins(Cluster&) {}
  virtual void cluster_ends(Cluster&) {}

  // Before the bytes are read or written. For loads, `undefined` (when checks of values are on) is
  // where the observer leaves, by lane, whether any byte is undefined.
  virtual void access(Warp&, const Access&) {}

  // An asynchronous operation will write these bytes from now on (its access() follows when it
  // does): nobody may touch them. issue() comes once a range.
  virtual void async_begins(Warp&, const Access&) {}

  virtual void synchronise(Warp&, const SyncEvent&) {}

  // Before each instruction, for definedness of registers.
  virtual void execute(Warp&, const Instruction&, uint32_t /*mask*/) {}
};

}  // namespace gpu_emulator::exec
