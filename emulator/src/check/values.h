#pragma once

// Undefined values in registers: bits of Frame::undefined, one for each lane and 16 bits of a
// register. They come from registers and memory never written, go from operands to results as
// Effects::flow says (a select passes on the side it takes; a product of matrices passes on rows of
// A and columns of B), and are reported where they decide something: as an address, a predicate of
// a guard, or a value stored to global memory. Arithmetic on them is no error: kernels compute on
// rows that a select masks later.
//
// A frame has bits only while it may hold an undefined value, so that most instructions cost
// nothing.

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "../exec/warp.h"

namespace gpu_emulator::check {

class Values {
 public:
  explicit Values(const exec::Program& program);

  // Before the instruction. Fails with a report where an undefined value decides.
  void execute(exec::Warp& warp, const exec::Instruction& in, uint32_t mask) {
    if (warp.pc == 0) begin_function(warp);
    exec::Frame& frame = warp.frames[warp.fragment().frame];
    if (!frame.undefined.empty()) follow(warp, frame, in, mask);
  }

  // What the lane's store or atomic operation writes: bit k = byte k is undefined.
  uint64_t stored(const exec::Warp& warp, int lane) const;
  // Bytes the lane's load found undefined.
  void loaded(exec::Warp& warp, int lane, uint64_t undefined_bytes);
  // Forgets frames' bits where nothing is undefined any more.
  static void tidy(exec::Warp& warp);

 private:
  // Words of Frame::undefined that are read on a path from the beginning without a write.
  struct Unassigned {
    std::vector<uint32_t> words;
  };
  static Unassigned find_unassigned(const exec::Function& function);

  void begin_function(exec::Warp& warp);
  void follow(exec::Warp& warp, exec::Frame& frame, const exec::Instruction& in, uint32_t mask);

  std::unordered_map<const exec::Function*, Unassigned> unassigned_;
};

}  // namespace gpu_emulator::check
