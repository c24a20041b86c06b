// The Hopper backend as the rest of the library sees it.
#pragma once

#include <cstddef>

#include "common/flash.h"
#include "hopper/tile_size.h"

namespace flash::hopper {

inline constexpr int kComputeCapability = 90;

// Whether mha_fwd can do it: pages are whole boxes, and begin where keys do.
bool takes(const Flash_fwd_params& p);

// Forward of a dense or packed batch or over a KV cache, to which what is to be appended has been;
// enqueued on p.target. fp16, bf16; head dims at most kMaxHeadDim; tensors that can_map
// (common/operand_views.h); calls that it takes. Throws ApiError.
void mha_fwd(const Flash_fwd_params& p);
// Bytes of workspace that mha_fwd needs for a call on p.target.
size_t mha_fwd_workspace_bytes(const Flash_fwd_params& p);

}  // namespace flash::hopper
