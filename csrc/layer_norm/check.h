// Arguments, checked.
#pragma once

#include <vector>

#include "base/tensor.h"
#include "flash_attn/layer_norm.h"
#include "layer_norm/params.h"

namespace flash::layer_norm {

// Throw ApiError for arguments that break flash_attn/layer_norm.h.
FwdParams check(const flash_attn_layer_norm_fwd_args& args);
BwdParams check(const flash_attn_layer_norm_bwd_args& args);

// Elements of index tensors, which must be readable: each row is named once at most.
void check_subsets(const NormParams& params);

std::vector<Region> written_by(const flash_attn_layer_norm_fwd_args& args);
std::vector<Region> written_by(const flash_attn_layer_norm_bwd_args& args);
std::vector<Region> read_by(const flash_attn_layer_norm_fwd_args& args);
std::vector<Region> read_by(const flash_attn_layer_norm_bwd_args& args);

}  // namespace flash::layer_norm
