// The backward's preparation of its rows, with products by mma.sync.
#pragma once

#include "sm80/far_rows.h"
#include "warp/bwd_prepare.h"

namespace flash::sm80 {

template <RowConfig C>
FLASH_DEVICE void prepare(const BwdParams& p, const BwdPrepareLaunch& launch) {
  prepare_rows<C, FarScores>(p, launch);
}

}  // namespace flash::sm80
