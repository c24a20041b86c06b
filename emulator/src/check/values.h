#pragma once

// Undefined values in registers: bits of Frame::undefined, one for each lane and 16 bits of a
// register. They come from registers and memory never written, go from operands to results as
// Effects::flow says (a select passes on the side it takes; a product of matrices passes on rows of
// A and columns of B), and are reported where they decide something: as an address, a predicate of
// a guard, or a value stored to global memory. Arithmetic on them is no error: kernels compute on
// rows that a select masks later.
//
// A frame has bits only while it may hold an undefined value, and an instruction is followed only
// where some may be in the places of its registers, so that most instructions cost nothing.

#include <bitset>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "../exec/warp.h"
#include "state.h"

namespace gpu_emulator::exec {
struct WgmmaOperation;
struct WgmmaShape;
}  // namespace gpu_emulator::exec

namespace gpu_emulator::check {

inline constexpr uint32_t kUnitBytes = 64;  // of Frame::undefined's index

class Values {
 public:
  explicit Values(const exec::Program& program);

  // Before the instruction. Fails with a report where an undefined value decides.
  void execute(exec::Warp& warp, const exec::Instruction& in, uint32_t mask) {
    if (warp.pc == 0) begin_function(warp);
    WarpState& state = state_of(warp);
    if (state.function != warp.function) {
      state.function = warp.function;
      state.places = places_[static_cast<size_t>(warp.function - functions_)].data();
    }
    if (!(state.undefined_places & state.places[warp.pc])) return;
    exec::Frame& frame = warp.frames[warp.fragment().frame];
    if (!frame.undefined.empty()) follow(warp, frame, in, mask);
  }

  // What the lane's store or atomic operation writes: bit k = byte k is undefined.
  uint64_t stored(const exec::Warp& warp, int lane) const;
  // Whether stored() may be other than 0 for some lane.
  bool may_store_undefined(const exec::Warp& warp) const;
  // Bytes the lane's load found undefined.
  void loaded(exec::Warp& warp, int lane, uint64_t undefined_bytes);
  // Lanes whose half of accumulator register i of a wgmma lies in one of these rows (of the warp's
  // 16) or columns.
  static uint32_t lanes_of_product(const exec::WgmmaShape& shape, int i, uint32_t half,
                                   uint32_t rows, const std::bitset<256>& columns);
  // A wgmma of the warp is complete: what its operands in shared memory make undefined.
  static void completed(exec::Warp& warp, const exec::WgmmaOperation& operation);
  static bool is_undefined(const exec::Warp& warp, exec::Slot slot, int lane);
  // Forgets frames' bits where nothing is undefined any more.
  static void tidy(exec::Warp& warp);

 private:
  void begin_function(exec::Warp& warp);
  void follow(exec::Warp& warp, exec::Frame& frame, const exec::Instruction& in, uint32_t mask);

  const exec::Function* functions_;
  std::vector<std::vector<uint64_t>> places_;  // of the registers of each function's instructions
  std::unordered_map<const exec::Function*, std::vector<uint32_t>> unassigned_;
};

}  // namespace gpu_emulator::check
