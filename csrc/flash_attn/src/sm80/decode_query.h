// Q of the decode kernels.
#pragma once

#include "sm80/decode_place.h"
#include "sm80/load.h"
#include "sm80/query.h"

namespace flash::sm80 {

// Q's rows to shared memory, by the whole CTA.
template <DecodeConfig C>
FLASH_DEVICE void load_q(const FwdParams& p, const DecodeLaunch& launch, const DecodePlace<C>& here,
                         uint32_t sQ) {
  constexpr int kChunksOfRow = C.head_dim / kChunkElements;
#pragma unroll 1
  for (int i = threadIdx.x; i < kDecodeRows * kChunksOfRow; i += C.threads()) {
    const int row = i / kChunksOfRow, chunk = i % kChunksOfRow;
    const uint32_t destination = sQ + SmemPlan<C>::Q::offset(row, chunk);
    const int columns = row < here.rows ? static_cast<int>(p.d) - chunk * kChunkElements : 0;
    const char* source = here.row_of(p.q, min(row, here.rows - 1)) + chunk * kChunkBytes;
    if (launch.q_aligned) {
      ptx::cp_async_16_bytes<0, 0>(destination, source, columns > 0);
    } else {
      copy_elements(destination, source, columns * kElementBytes);
    }
  }
  ptx::cp_async_commit_group();
}

// Negates and rotates Q, whose copies have landed.
template <DecodeConfig C>
FLASH_DEVICE void prepare_q(const FwdParams& p, const DecodeLaunch& launch,
                            const DecodePlace<C>& here, uint32_t sQ) {
  using Q = typename SmemPlan<C>::Q;
  if (launch.negate_q) {
    negate_q<Q, kDecodeRows, C.threads()>(sQ);
    __syncthreads();
  }
  if (p.rotary_dim == 0) return;
  const bool positions_differ = p.window_left >= 0 || p.window_right >= 0;
  rotate_q<C.dtype, Q, C.threads()>(p, sQ, here.rows, threadIdx.x, [&](int row) {
    return here.seq.cached + (positions_differ ? here.query(row) : 0);
  });
  __syncthreads();
}

}  // namespace flash::sm80
