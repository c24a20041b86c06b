// What the backward needs of each query before it walks over keys: delta = rowsum(dO * O) - dlse,
// left in softmax_d, and the references of rows that are far from 0. Also zeros for rows of dq that
// no key sees, or that belong to no sequence. A CTA has a tile of rows of one head, eight lanes a
// row.
#pragma once

#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "common/bounded_sequence.h"
#include "warp/bwd_params.h"
#include "warp/far_rows.h"
#include "warp/packed_tile.h"
#include "warp/smem_tile.h"

namespace flash {

inline constexpr int kPrepareLanes = RowConfig::threads() / kPrepareRows;  // of a row

// This chunk of a row's product of O and dO.
template <Dtype kDtype>
FLASH_DEVICE float dot_chunk(const char* x, const char* y, int elements, bool aligned) {
  float sum = 0.f;
  if (aligned) {
    const uint4 a = *reinterpret_cast<const uint4*>(x), b = *reinterpret_cast<const uint4*>(y);
    const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum = fmaf(ptx::to_float<kDtype>(static_cast<uint16_t>(as[i / 2] >> (i % 2 * 16))),
                 ptx::to_float<kDtype>(static_cast<uint16_t>(bs[i / 2] >> (i % 2 * 16))), sum);
    return sum;
  }
  for (int i = 0; i < elements; ++i)
    sum = fmaf(ptx::to_float<kDtype>(reinterpret_cast<const uint16_t*>(x)[i]),
               ptx::to_float<kDtype>(reinterpret_cast<const uint16_t*>(y)[i]), sum);
  return sum;
}

// This lane's part of rowsum(dO * O) of a query.
template <Dtype kDtype>
FLASH_DEVICE float partial_sum(const BwdParams& p, const BwdPrepareLaunch& launch,
                               const Sequence& seq, int head, int query, int lane) {
  const char* o = operand_row(p.o, kDtype, seq.batch, seq.q_row + query, head);
  const char* dout = operand_row(p.dout, kDtype, seq.batch, seq.q_row + query, head);
  float sum = 0.f;
  for (int column = lane * kChunkElements; column < p.d_v;
       column += kPrepareLanes * kChunkElements) {
    sum += dot_chunk<kDtype>(o + column * kElementBytes, dout + column * kElementBytes,
                             min(kChunkElements, static_cast<int>(p.d_v) - column),
                             launch.o_aligned && launch.dout_aligned);
  }
  return sum;
}

template <Dtype kDtype>
FLASH_DEVICE void clear_dq(const BwdParams& p, int64_t batch, int64_t row, int head, int lane) {
  auto* dq = reinterpret_cast<uint16_t*>(operand_row(p.dq, kDtype, batch, row, head));
  for (int i = lane; i < p.d; i += kPrepareLanes) dq[i] = 0;
}

// delta of a row of a sequence, in all of its lanes; all of a warp come.
template <Dtype kDtype>
FLASH_DEVICE void store_delta(const BwdParams& p, const BwdPrepareLaunch& launch,
                              const Sequence& seq, int head, int query, int lane) {
  const bool exists = query < seq.seqlen_q;
  float delta = exists ? partial_sum<kDtype>(p, launch, seq, head, query, lane) : 0.f;
#pragma unroll
  for (int step = kPrepareLanes / 2; step > 0; step /= 2)
    delta += __shfl_xor_sync(0xffffffffu, delta, step);
  if (!exists) return;
  if (p.dlse != nullptr)
    delta -= p.dlse[seq.batch * p.dlse_batch_stride + head * p.dlse_head_stride +
                    (seq.lse_row + query) * p.dlse_row_stride];
  const int64_t first = p.cu_seqlens_q == nullptr ? 0 : seq.lse_row + 128 * int64_t{seq.batch};
  if (lane == 0)
    p.dsoftmax_sum[seq.batch * p.dsoftmax_batch_stride + head * p.dsoftmax_head_stride + first +
                   query] = delta;
  const KeyRange keys = mask_of(p, seq).keys(query);
  if (keys.end <= keys.begin) clear_dq<kDtype>(p, seq.batch, seq.q_row + query, head, lane);
}

// `FarScores`: far_rows.h.
template <RowConfig C, template <Dtype> class FarScores>
FLASH_DEVICE void prepare_rows(const BwdParams& p, const BwdPrepareLaunch& launch) {
  const int number = ptx::read_ctaid_x(), b = static_cast<int>(p.b);
  const int batch_head = number / launch.tiles, tile = number % launch.tiles;
  const int head = batch_head % static_cast<int>(p.h);
  const int row = static_cast<int>(threadIdx.x) / kPrepareLanes;
  const int lane = static_cast<int>(threadIdx.x) % kPrepareLanes;
  PackedTile place{batch_head / static_cast<int>(p.h), tile, 0};
  if (p.cu_seqlens_q != nullptr)
    place = packed_tile<kPrepareRows>(p.cu_seqlens_q, p.seqlen_q, b, tile, launch.tiles);
  if (place.batch < b) {
    IndexFaults faults;  // the main kernel reports them
    const Sequence seq = bounded_sequence(p, place.batch, launch.bounds.max_cached, faults);
    const int first_query = place.m_block * kPrepareRows;
    store_delta<C.dtype>(p, launch, seq, head, first_query + row, lane);
    store_references<C, FarScores>(p, launch, seq, head, first_query);
    return;
  }
  const int64_t first = p.cu_seqlens_q[b];
  if (first < 0) return;
  for (int64_t i = first + place.m_block * kPrepareRows + row; i < p.total_q;
       i += place.others * kPrepareRows)
    clear_dq<C.dtype>(p, 0, i, head, lane);
}

}  // namespace flash
