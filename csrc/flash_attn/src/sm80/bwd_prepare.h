// What the backward needs of each query before it walks over keys: delta = rowsum(dO * O) - dlse,
// left in softmax_d. Also zeros for rows of dq that no key sees.
//
// softmax_d has more rows than there are queries: 128 more behind each sequence of a packed batch,
// or as many as fill up a multiple of 128. They become 0. Eight lanes take care of a row of it; of
// those behind the last sequence there are as many as rows of dq that belong to no sequence, and
// these become 0 with them.
#pragma once

#include "base/ptx/special_registers.h"
#include "common/bounded_sequence.h"
#include "sm80/bwd_params.h"
#include "sm80/query.h"
#include "sm80/row_config.h"
#include "sm80/smem.h"

namespace flash::sm80 {

// A row of softmax_d: of `query` of a sequence, if that has so many; batch p.b is none.
struct DeltaRow {
  int batch;
  int64_t query;
};

// The sequence whose rows, 128 more for each, include row `row` of a packed batch's softmax_d.
FLASH_DEVICE DeltaRow packed_delta_row(const SequenceGeometry& p, int b, int64_t row) {
  int begin = 0, end = b + 1;  // the first entry beyond the row is one of (begin, end]
  while (end - begin > 1) {
    const int middle = (begin + end) / 2;
    if (p.cu_seqlens_q[middle] + 128 * int64_t{middle} <= row) {
      begin = middle;
    } else {
      end = middle;
    }
  }
  return {begin, row - p.cu_seqlens_q[begin] - 128 * int64_t{begin}};
}

// Chunk `chunk` of a row's product of O and dO.
template <Dtype kDtype>
FLASH_DEVICE float dot_chunk(const char* x, const char* y, int elements, bool aligned) {
  float sum = 0.f;
  if (aligned) {
    const uint4 a = *reinterpret_cast<const uint4*>(x), b = *reinterpret_cast<const uint4*>(y);
    const uint32_t as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      sum = fmaf(to_float<kDtype>(static_cast<uint16_t>(as[i / 2] >> (i % 2 * 16))),
                 to_float<kDtype>(static_cast<uint16_t>(bs[i / 2] >> (i % 2 * 16))), sum);
    return sum;
  }
  for (int i = 0; i < elements; ++i)
    sum = fmaf(to_float<kDtype>(reinterpret_cast<const uint16_t*>(x)[i]),
               to_float<kDtype>(reinterpret_cast<const uint16_t*>(y)[i]), sum);
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

template <RowConfig C>
FLASH_DEVICE void prepare(const BwdParams& p, const BwdPrepareLaunch& launch) {
  const int64_t thread = static_cast<int64_t>(ptx::read_ctaid_x()) * C.threads() + threadIdx.x;
  const int lane = static_cast<int>(thread % kPrepareLanes);
  const int64_t rows = launch.rows * launch.heads;
  // Lanes of no row do the last one's work: all of a warp shuffle.
  const int64_t number = min(thread / kPrepareLanes, rows - 1);
  const int64_t batch_head = number / launch.rows, row = number % launch.rows;
  const bool is_packed = p.cu_seqlens_q != nullptr;
  const int head = static_cast<int>(batch_head % p.h), b = static_cast<int>(p.b);
  const DeltaRow place =
      is_packed ? packed_delta_row(p, b, row) : DeltaRow{static_cast<int>(batch_head / p.h), row};
  const bool has_sequence = place.batch < b;
  IndexFaults faults;  // the main kernel reports them
  const Sequence seq = has_sequence
                           ? bounded_sequence(p, place.batch, launch.bounds.max_cached, faults)
                           : Sequence{};
  const bool is_query = place.query >= 0 && place.query < seq.seqlen_q;
  const int query = is_query ? static_cast<int>(place.query) : 0;
  float delta = is_query ? partial_sum<C.dtype>(p, launch, seq, head, query, lane) : 0.f;
#pragma unroll
  for (int step = kPrepareLanes / 2; step > 0; step /= 2)
    delta += __shfl_xor_sync(0xffffffffu, delta, step);
  if (thread / kPrepareLanes >= rows) return;

  if (is_query) {
    if (p.dlse != nullptr)
      delta -= p.dlse[seq.batch * p.dlse_batch_stride + head * p.dlse_head_stride +
                      (seq.lse_row + query) * p.dlse_row_stride];
    const KeyRange keys = mask_of(p, seq).keys(query);
    if (keys.end <= keys.begin) clear_dq<C.dtype>(p, seq.batch, seq.q_row + query, head, lane);
  } else if (!has_sequence && place.query < p.total_q - p.cu_seqlens_q[b]) {
    clear_dq<C.dtype>(p, 0, p.cu_seqlens_q[b] + place.query, head, lane);
  }
  const int64_t batch = is_packed ? 0 : place.batch;
  if (lane == 0)
    p.dsoftmax_sum[batch * p.dsoftmax_batch_stride + head * p.dsoftmax_head_stride + row] = delta;
}

}  // namespace flash::sm80
