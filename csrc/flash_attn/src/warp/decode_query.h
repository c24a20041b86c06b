// Q of the decode kernels.
#pragma once

#include "warp/decode_place.h"
#include "warp/load.h"
#include "warp/negate_q.h"
#include "warp/rotary.h"

namespace flash {

// Q's rows to shared memory, a tile Q, by the CTA's first C.q_threads() threads.
template <auto C, class Q>
FLASH_DEVICE void load_q(const Operands& p, const DecodePlan& launch, const DecodePlace<C>& here,
                         uint32_t sQ) {
  constexpr int kChunksOfRow = C.head_dim / kChunkElements;
#pragma unroll 1
  for (int i = threadIdx.x; i < C.rows() * kChunksOfRow; i += C.q_threads()) {
    const int row = i / kChunksOfRow, chunk = i % kChunksOfRow;
    const uint32_t destination = sQ + Q::offset(row, chunk);
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

// Negates and rotates Q, whose copies have landed. sync() brings these threads together.
template <auto C, class Q, class Params, class Sync>
FLASH_DEVICE void prepare_q(const Params& p, const DecodePlan& launch, const DecodePlace<C>& here,
                            uint32_t sQ, const Sync& sync) {
  if (launch.negate_q) {
    negate_q<Q, C.rows(), C.q_threads()>(sQ);
    sync();
  }
  if (p.rotary_dim == 0) return;
  const bool positions_differ = p.window_left >= 0 || p.window_right >= 0;
  rotate_q<C.dtype, Q, C.q_threads()>(p, sQ, here.rows, threadIdx.x, [&](int row) {
    return here.seq.cached + (positions_differ ? here.query(row) : 0);
  });
  sync();
}

}  // namespace flash
