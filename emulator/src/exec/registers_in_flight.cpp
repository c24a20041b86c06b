#include "registers_in_flight.h"

#include <algorithm>

namespace gpu_emulator::exec {
namespace {

constexpr uint32_t kSlotBytes = 64;
constexpr uint32_t kPoison = 0xffdeffde;  // NaN as fp32, and as two fp16 or bf16

}  // namespace

RegistersInFlight::Value* RegistersInFlight::take(std::byte* frame, Slot slot,
                                                  bool as_accumulator) {
  if (count_ == 0) frame_ = frame;
  if (frame != frame_) return nullptr;
  const size_t index = slot / kSlotBytes;
  if (index >= by_slot_.size()) by_slot_.resize(index + 1);
  if (Value* value = by_slot_[index]) {
    if (value->is_accumulator != as_accumulator) return nullptr;
    ++value->users;
    return value;
  }
  if (free_.empty()) free_.push_back(&values_.emplace_back());
  Value* value = free_.back();
  free_.pop_back();
  value->reg = reinterpret_cast<uint32_t*>(frame + slot);
  value->slot = slot;
  value->users = 1;
  value->is_accumulator = as_accumulator;
  std::copy(value->reg, value->reg + kWarpSize, value->lanes);
  std::fill(value->reg, value->reg + kWarpSize, kPoison);
  by_slot_[index] = value;
  ++count_;
  return value;
}

bool RegistersInFlight::release(Value* value) {
  if (--value->users) return true;
  by_slot_[value->slot / kSlotBytes] = nullptr;
  free_.push_back(value);
  --count_;
  const bool untouched = std::all_of(value->reg, value->reg + kWarpSize,
                                     [](uint32_t lane) { return lane == kPoison; });
  std::copy(value->lanes, value->lanes + kWarpSize, value->reg);
  return untouched;
}

}  // namespace gpu_emulator::exec
