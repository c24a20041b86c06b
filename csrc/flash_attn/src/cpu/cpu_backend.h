// The CPU backend as the rest of the library sees it.
#pragma once

#include "base/cpu/isa.h"
#include "common/flash.h"

namespace flash::cpu {

// Kernels of one instruction set. Every instance has every feature, every dtype of 16 and 32 bits,
// and head dims 1..FLASH_ATTN_MAX_HEAD_DIM. They throw std::bad_alloc when memory runs out, and
// nothing else.
struct Kernels {
  const char* isa;
  // Dense, varlen, paged; appends knew and vnew first if given.
  void (*mha_fwd)(const Flash_fwd_params& params);
  void (*mha_bwd)(const Flash_bwd_params& params);  // dense, varlen
  void (*combine)(const Combine_params& params);
};

// Those of an instruction set that is available.
const Kernels& kernels_of(Isa isa);

// One translation unit each.
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
extern const Kernels kernels_amx;
extern const Kernels kernels_wide16;
extern const Kernels kernels_soft_dot;
extern const Kernels kernels_soft_tiles;

}  // namespace flash::cpu
