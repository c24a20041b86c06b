// The Hopper backend as the rest of the library sees it.
#pragma once

#include <cstddef>

#include "common/flash.h"
#include "hopper/bwd_tile_size.h"
#include "hopper/decode_table.h"
#include "hopper/tile_size.h"

namespace flash::hopper {

inline constexpr int kComputeCapability = 90;

// Whether mha_fwd can do it: pages are whole boxes, and begin where keys do.
bool takes(const Flash_fwd_params& p);

// Forward of a dense or packed batch or over a KV cache, to which what is to be appended has been;
// enqueued on p.target. fp16, bf16, e4m3 with an output in bf16; head dims at most kMaxHeadDim;
// tensors that can_map (common/operand_views.h); calls that it takes. Throws ApiError.
void mha_fwd(const Flash_fwd_params& p);
// Bytes of workspace that mha_fwd needs for a call on p.target.
size_t mha_fwd_workspace_bytes(const Flash_fwd_params& p);

// Whether mha_decode is to do a call that is one of decoding: it has more rows of queries than
// sm80's reads keys for at a time, and neither bias nor dropout. Beyond kMaxHeadDim V is a part of
// K.
bool takes_decode(const Flash_fwd_params& p);

// The same of few queries over many keys, or over a cache, whose keys CTAs share.
void mha_decode(const Flash_fwd_params& p);
size_t mha_decode_workspace_bytes(const Flash_fwd_params& p);
// Whether mha_bwd can do it, of tensors that can_map: head dims at most kMaxBwdHeadDim, plain
// scores, dout too is a tensor that can_map.
bool takes(const Flash_bwd_params& p);

// Backward of a dense or packed batch, enqueued on p.target, but for ds_aux; calls that it takes.
// Bit for bit the same whenever it runs. Throws ApiError.
void mha_bwd(const Flash_bwd_params& p);
size_t mha_bwd_workspace_bytes(const Flash_bwd_params& p);

}  // namespace flash::hopper
