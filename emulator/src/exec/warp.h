#pragma once

// State of one warp. A warp is a tree of fragments: sets of lanes at one pc. A divergent branch
// parks its fragment at the branch's immediate post-dominator and makes one child a side; children
// that arrive there hand their lanes back. A call is a child fragment as well, in a new frame. The
// scheduler runs every runnable fragment, so lanes of a warp may wait for each other.

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "program.h"

namespace gpu_emulator::exec {

struct Cta;
struct Worker;
struct HopperWarpState;  // hopper_state.h: bulk groups, wgmma

// Every byte of registers and memory that nobody has written: NaN in every floating type.
inline constexpr int kPoison = 0xff;

struct AlignedDelete {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using AlignedBytes = std::unique_ptr<std::byte[], AlignedDelete>;
AlignedBytes allocate_aligned(size_t bytes);

// Registers and local memory of one activation of a function.
struct Frame {
  const Function* function = nullptr;
  AlignedBytes registers;
  uint32_t local_base = 0;  // of this frame in each lane's local memory
  // For checks of values, made by the observer: by register slot / 64, bit = lane; so a 32-bit
  // register has a word for its low and one for its high half, a 64-bit one four.
  std::vector<uint32_t> undefined;
};

struct Votes {  // of threads in barrier.red
  uint32_t all = 0, yes = 0;
};

inline constexpr uint64_t kNotArrived = ~uint64_t{0};

struct Wait {  // why a fragment does not run: for the scheduler and the deadlock report
  enum class Kind : uint8_t {
    kNone,
    kBarrier,         // id: barrier of the CTA; generation: of that barrier at the warp's arrival,
                      // kNotArrived before it
    kWarpSync,        // id: membermask of bar.warp.sync, or of a collective of the warp
    kClusterBarrier,  // generation
    kMbarrier,        // id: shared address; generation: the phase waited for
    kWarpgroup,       // wgmma.wait_group: id = groups that must be complete
    kOther,           // text
  };
  Kind kind = Kind::kNone;
  uint32_t id = 0;
  uint64_t generation = 0;
  const char* text = "";
  Votes votes = {};      // kBarrier: when it is complete
  bool expired = false;  // kMbarrier: nothing else can go on, so the wait gives up
};

struct Fragment {
  enum class State : uint8_t {
    kRunnable,
    kJoining,   // waits for its children at pc
    kFinished,  // slot free
  };
  State state = State::kRunnable;
  bool released = false;  // kJoining: its lanes do not wait for each other any more
  bool is_call = false;   // root of a callee: its lanes go back to the parent by ret
  uint32_t pc = 0;
  uint32_t mask = 0;
  uint32_t reconverge = kNoPc;  // hands its lanes to the parent here
  int parent = -1;
  int children = 0;  // fragments not finished whose parent is this one
  int frame = 0;     // index into Warp::frames
  int polls = 0;     // kJoining: turns that others ended by polling, since lanes arrived
  Wait wait;
};

// One cp.async instruction (PTX 9.7.9.25.3), not complete yet.
struct PendingCopy {
  const Instruction* instruction;
  uint32_t pc;
  const Function* function;
  uint32_t mask;                   // lanes not complete
  bool is_moved;                   // the bytes are there, nobody may know
  std::array<uint32_t, 32> group;  // commit_group count of the lane at issue
  std::array<uint64_t, 32> source;
  std::array<uint32_t, 32> destination;  // shared address
  std::array<uint8_t, 32> source_bytes;
};

struct Warp {
  // Hot: operands of the current fragment.
  std::byte* bases[2] = {nullptr, nullptr};  // registers, constants
  uint32_t pc = 0;
  uint32_t live = 0;  // lanes that have not exited
  int current = 0;    // fragment
  Cta* cta = nullptr;
  Worker* worker = nullptr;            // counters and caches of the host thread that runs it
  const Function* function = nullptr;  // of the current fragment

  uint32_t id = 0;  // in the CTA
  std::vector<Fragment> fragments;
  std::deque<Frame> frames;
  std::unique_ptr<std::byte[]> local;  // lane-major: local_capacity bytes a lane
  uint32_t local_capacity = 0;
  uint64_t executed = 0;  // warp instructions
  bool done = false;
  bool released = false;  // some fragment was: its lanes may come to collectives one by one

  std::vector<PendingCopy> copies;       // cp.async in order of issue
  std::array<uint32_t, 32> copy_groups;  // commit_group executed, by lane
  std::shared_ptr<HopperWarpState> hopper;
  void* observed = nullptr;  // the observer's own state

  // Lanes of an operand. T is uint32_t, or uint64_t for 64-bit registers.
  template <class T>
  T* lanes(Slot slot) {
    return reinterpret_cast<T*>(
        __builtin_assume_aligned(bases[slot >> 31] + (slot & ~kConstantBit), 64));
  }
  template <class T>
  const T* lanes(Slot slot) const {
    return const_cast<Warp*>(this)->lanes<T>(slot);
  }
  uint32_t predicate(Slot slot) const {  // bit = lane
    return *reinterpret_cast<const uint32_t*>(bases[slot >> 31] + (slot & ~kConstantBit));
  }
  void set_predicate(Slot slot, uint32_t mask, uint32_t value) {
    auto* p = reinterpret_cast<uint32_t*>(bases[0] + slot);
    *p = (*p & ~mask) | (value & mask);
  }
  Fragment& fragment() { return fragments[current]; }
  const Fragment& fragment() const { return fragments[current]; }
  const Slot* list(const Instruction& in) const { return function->lists.data() + in.list; }
  std::byte* local_memory(int lane) { return local.get() + size_t{local_capacity} * lane; }
};

// The value of an operand that must be the same in all lanes of mask (a barrier's id, a count);
// fails with kInvalidOperand naming `what` where it is not.
uint32_t uniform(const Warp& warp, Slot slot, uint32_t mask, const char* what);

// Requires that all lanes of the warp that have not exited execute this instruction together.
void require_converged(const Warp& warp, uint32_t mask, const char* what);
// And that none has exited.
void require_whole_warp(const Warp& warp, uint32_t mask, const char* what);

inline int first_lane(uint32_t mask) { return __builtin_ctz(mask); }
inline uint32_t lane_count(uint32_t mask) {
  return mask == kAllLanes ? kWarpSize : static_cast<uint32_t>(__builtin_popcount(mask));
}

// Calls f(lane) for the lanes of mask, lowest first.
template <class F>
inline void for_each_lane(uint32_t mask, F&& f) {
  if (mask == kAllLanes) {
    for (int lane = 0; lane < kWarpSize; ++lane) f(lane);
    return;
  }
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

}  // namespace gpu_emulator::exec
