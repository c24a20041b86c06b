// The CPU backend as the rest of the library sees it.
#pragma once

#include <cstddef>

#include "common/flash.h"

namespace flash::cpu {

// Kernels of one instruction set. Every instance has every feature, dtype and head
// dim 1..FLASH_ATTN_MAX_HEAD_DIM. They throw std::bad_alloc when memory runs out, and nothing else.
struct Kernels {
  const char* isa;  // "baseline", "avx2", "avx512", "avx512bf16", "amx"
  void (*mha_fwd)(
      const Flash_fwd_params& params);  // dense, varlen, paged; appends knew/vnew first if given
  void (*mha_bwd)(const Flash_bwd_params& params);  // dense, varlen
  void (*combine)(const Combine_params& params);
};

// Instruction sets of this build that this CPU runs, best last; count is at least 1 (baseline).
const Kernels* const* available(int* count);
// The one in use: set_current's, else FLASH_ATTENTION_CPU_ISA's, else the best. Both throw ApiError
// if a variable of the environment that they read has a value that it cannot have.
const Kernels& current();
// False when no such instruction set is available. nullptr restores the default.
bool set_current(const char* isa);

int num_threads();  // of the next parallel region of this thread

}  // namespace flash::cpu
