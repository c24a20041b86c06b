// The decode kernel as the forward's launch code sees it.
#pragma once

#include <cstddef>

#include "common/flash.h"

namespace flash::sm80 {

// Of a call with new rows for the cache: whether launch_decode appends them. It does where a head's
// queries are one tile and new rows are few.
bool decode_appends(const Flash_fwd_params& p);

// Of a call that takes it. Throws ApiError.
void launch_decode(const Flash_fwd_params& p);

}  // namespace flash::sm80
