#pragma once

// What checks see of an execution. Every access of every kind goes through memory.h, which tells
// the observer; synchronisation tells it who has seen whom. A launch without checks has none.
// Implementations override what they need; calls come from several host threads at once (one
// cluster never from two).

#include <cstddef>
#include <cstdint>
#include <vector>

#include "program.h"

namespace gpu_emulator::exec {

struct Cta;
struct Cluster;
struct WgmmaOperation;

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
  // Of an asynchronous operation that is complete: for the lanes of mask one after the other, which
  // bytes hold no defined value (not 0); empty: none. Loads: where the observer leaves it; stores
  // and atomics: what is written.
  std::vector<std::byte>* undefined = nullptr;
};

enum class SyncKind : uint8_t {
  kBarrierArrive,  // id: barrier of the CTA; mask: all lanes of the warp; before it counts. A warp
                   // may arrive more than once before kBarrierComplete
  kBarrierComplete,  // id; all warps that arrived may go on
  kBarrierLeave,     // id; the lanes of mask go on
  kWarpSync,         // mask: lanes that now see each other's writes
  kFence,            // membar, fence: order and scope; id 1: fence.mbarrier_init
  kProxyFence,       // fence.proxy.async and relatives (fence.proxy.tensormap: id 1)
  kMbarrierInit,     // id: shared address; every mbarrier event also has an access of kind kAtomic
                     // and order kRelaxed to its 8 bytes (init: a weak store), shown first
  kMbarrierInvalidate,
  kMbarrierArrive,    // id; order: release or relaxed. Of cp.async.mbarrier.arrive: when it takes
                      // effect, after the access() of the copies before it
  kMbarrierTransfer,  // id: complete_tx of an operation of the async proxy that this warp issued;
                      // after the operation's access() calls
  kMbarrierComplete,  // id: a phase ended; after the arrivals and transfers that ended it
  kMbarrierWait,      // id: a wait that found its phase complete
  kClusterArrive,     // order: release or relaxed
  kClusterComplete,   // all threads arrived; after the last arrival
  kClusterWait,       // the lanes of mask go on; order: acquire or relaxed
  kCopyWait,          // cp.async.wait_*: of the lanes of mask; completed copies were shown before
  kBulkWait,          // cp.async.bulk.wait_group: the lanes' bulk copies shown so far are complete;
                      // id 1: of .read, which waits for the source only
  kWarpgroupWait,     // wgmma.wait_group: the warpgroup's wgmma shown so far are complete for this
                      // warp; their operands are shown as accesses of its first warp, which is id
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

  // Before the bytes are read or written.
  virtual void access(Warp&, const Access&) {}

  // An asynchronous operation (cp.async, TMA, bulk copy, wgmma operands in shared memory) reads or
  // writes these bytes at any time from now on: for a write nobody may touch them, for a read
  // nobody may write them. Once for each range, at issue. The same ranges come back in access()
  // when the operation is complete by the rules of PTX (the wait, the complete_tx), in every mode:
  // also where the bytes were moved at issue. All loads of an operation come before its stores;
  // lanes of cp.async whose source is ignored (zero fill) have a store and no load.
  virtual void async_begins(Warp&, const Access&) {}

  // This warp has waited for its part of the operation; after the access() of its operands.
  virtual void wgmma_completes(Warp&, const WgmmaOperation&) {}

  // Whether the lane's value of the register is undefined now: of what an operation takes along
  // when it is issued.
  virtual bool is_undefined(const Warp&, Slot, int /*lane*/) const { return false; }

  virtual void synchronise(Warp&, const SyncEvent&) {}

  // Before each instruction, for definedness of registers; also when no lane of the fragment passes
  // the guard (mask 0). Again before each retry of an instruction that waited.
  virtual void execute(Warp&, const Instruction&, uint32_t /*mask*/) {}
};

}  // namespace gpu_emulator::exec
