// Which kernel a call takes, and how many CTAs.
#pragma once

#include <cstdint>

#include "common/flash.h"
#include "common/tile_scheduler.h"
#include "hopper/kernel_list.h"

namespace flash::hopper {

const FwdKernel& choose(const Flash_fwd_params& p);

// The tiles of a call, in the order in which they start.
Tile_scheduler schedule(const Flash_fwd_params& p, const Tile& tile, int64_t l2_cache_bytes);

// Rows of K and V that one TMA instruction copies.
int box_keys(const Flash_fwd_params& p, const Tile& tile);

// Whether CTAs that have finished a tile ask for the next one, instead of taking every so many:
// where tiles differ in length and there are more of them than CTAs.
bool takes_tiles_by_counter(const Flash_fwd_params& p, int64_t tiles, int64_t ctas);

}  // namespace flash::hopper
