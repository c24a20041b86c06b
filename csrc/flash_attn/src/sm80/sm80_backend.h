// The sm80 backend as the rest of the library sees it.
#pragma once

#include <cstddef>

#include "common/flash.h"

namespace flash::sm80 {

inline constexpr int kMinComputeCapability = 80;

// Forward of a dense or packed batch or over a KV cache, after appending to it; enqueued on
// p.target. fp16, bf16; head dims at most kMaxHeadDim, kMaxHeadDimV (decode_table.h). Throws
// ApiError.
void mha_fwd(const Flash_fwd_params& p);

// Whether the kernels of decoding, which share keys among warps and CTAs, are those for a forward:
// few queries over many keys, or over a cache. A function of shapes, not of the lengths within a
// batch.
bool takes_decode(const Flash_fwd_params& p);

// Enqueues what is to be appended to the cache; nothing if that is nothing. Throws ApiError.
void append_kv(const Flash_fwd_params& p);

// Enqueues what writes p.s_dmask. Throws ApiError.
void store_dmask(const Flash_fwd_params& p);

// Backward of a dense or packed batch, enqueued on p.target. As mha_fwd, bit for bit the same
// whenever it runs; head dims at most kMaxBwdHeadDim (bwd_table.h). Throws ApiError.
void mha_bwd(const Flash_bwd_params& p);

// Enqueues what writes p.ds_aux, behind the preparation of the rows (warp/bwd_plan.h) of any
// backward. Throws ApiError.
void store_sink_gradient(const Flash_bwd_params& p);

// Merge of partial results into fp16, bf16 or fp32; any head dim. Throws ApiError.
void combine(const Combine_params& p);
// Bytes of workspace that mha_fwd needs for a call on p.target.
size_t mha_fwd_workspace_bytes(const Flash_fwd_params& p);
// The same of mha_bwd.
size_t mha_bwd_workspace_bytes(const Flash_bwd_params& p);

}  // namespace flash::sm80
