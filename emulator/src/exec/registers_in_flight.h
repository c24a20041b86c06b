#pragma once

// Registers of one warp that wgmma operations in flight own, in the modes that leave operations for
// later. They hold poison; their true values lie here.

#include <cstdint>
#include <deque>
#include <vector>

#include "program.h"

namespace gpu_emulator::exec {

class RegistersInFlight {
 public:
  struct Value {
    alignas(64) uint32_t lanes[kWarpSize];
    uint32_t* reg = nullptr;
    std::byte* frame = nullptr;
    Slot slot = kNoSlot;
    int users = 0;  // operations in flight
    bool is_accumulator = false;
  };

  // Takes a register of the frame for one more operation. nullptr: it is in flight in the other
  // role.
  Value* take(std::byte* frame, Slot slot, bool as_accumulator);

  // One operation less. The last one puts the value back; false: the register was written
  // meanwhile.
  bool release(Value* value);

  bool empty() const { return count_ == 0; }

 private:
  struct OfFrame {
    std::byte* frame = nullptr;
    int count = 0;
    std::vector<Value*> by_slot;
  };
  OfFrame& of_frame(std::byte* frame);

  int count_ = 0;
  std::vector<OfFrame> frames_;  // a caller and the functions it calls may all have some
  std::deque<Value> values_;
  std::vector<Value*> free_;
};

}  // namespace gpu_emulator::exec
