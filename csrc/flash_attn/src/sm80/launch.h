// What launches have in common, on the host.
#pragma once

#include <cstdint>

#include "base/target.h"
#include "common/bounded_sequence.h"
#include "sm80/append_params.h"
#include "sm80/kernel_list.h"

namespace flash::sm80 {

IndexBounds index_bounds(const Flash_fwd_params& p);
IndexBounds index_bounds(const Flash_bwd_params& p);

// How new rows go into the cache, of a call that appends some.
AppendPlan plan_append(const Flash_fwd_params& p);

}  // namespace flash::sm80
