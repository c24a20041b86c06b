#pragma once

// Element-wise reductions of asynchronous copies: *memory = op(*memory, value), each element
// atomically (relaxed), as several CTAs reduce into the same global memory.

#include <cstddef>
#include <cstdint>

#include "../ptx/module.h"

namespace gpu_emulator::exec {

enum class ReductionOp : uint8_t { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor };

struct Reduction {
  ReductionOp op = ReductionOp::kAdd;
  ptx::Type type = ptx::Type::kU32;  // f16, bf16, or an integer or float of 4 or 8 bytes
};

// bytes: a multiple of the type's size; memory is aligned to it.
void reduce(const Reduction& reduction, std::byte* memory, const std::byte* values, size_t bytes);

}  // namespace gpu_emulator::exec
