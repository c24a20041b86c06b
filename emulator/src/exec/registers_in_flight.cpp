#include "registers_in_flight.h"

#include <algorithm>

namespace gpu_emulator::exec {
namespace {

constexpr uint32_t kSlotBytes = 64;
constexpr uint32_t kPoison = 0xffdeffde;  // NaN as fp32, and as two fp16 or bf16

}  // namespace

// The frame's, or one that no frame uses.
RegistersInFlight::OfFrame& RegistersInFlight::of_frame(std::byte* frame) {
  for (OfFrame& own : frames_) {
    if (own.frame == frame) return own;
  }
  auto found = std::find_if(frames_.begin(), frames_.end(),
                            [](const OfFrame& own) { return own.count == 0; });
  if (found == frames_.end()) found = frames_.emplace(found);
  found->frame = frame;
  return *found;
}

RegistersInFlight::Value* RegistersInFlight::take(std::byte* frame, Slot slot,
                                                  bool as_accumulator) {
  OfFrame& own = of_frame(frame);
  const size_t index = slot / kSlotBytes;
  if (index >= own.by_slot.size()) own.by_slot.resize(index + 1);
  if (Value* value = own.by_slot[index]) {
    if (value->is_accumulator != as_accumulator) return nullptr;
    ++value->users;
    return value;
  }
  if (free_.empty()) free_.push_back(&values_.emplace_back());
  Value* value = free_.back();
  free_.pop_back();
  value->reg = reinterpret_cast<uint32_t*>(frame + slot);
  value->frame = frame;
  value->slot = slot;
  value->users = 1;
  value->is_accumulator = as_accumulator;
  std::copy(value->reg, value->reg + kWarpSize, value->lanes);
  std::fill(value->reg, value->reg + kWarpSize, kPoison);
  own.by_slot[index] = value;
  ++own.count;
  ++count_;
  return value;
}

bool RegistersInFlight::release(Value* value) {
  if (--value->users) return true;
  OfFrame& own = of_frame(value->frame);
  own.by_slot[value->slot / kSlotBytes] = nullptr;
  --own.count;
  free_.push_back(value);
  --count_;
  const bool untouched = std::all_of(value->reg, value->reg + kWarpSize,
                                     [](uint32_t lane) { return lane == kPoison; });
  std::copy(value->lanes, value->lanes + kWarpSize, value->reg);
  return untouched;
}

}  // namespace gpu_emulator::exec
