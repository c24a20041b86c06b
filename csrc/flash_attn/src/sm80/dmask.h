// S_dmask, a debugging output: exp(score - running row max) with the sign bit set where dropout
// drops. The running max is that of key blocks visited from the last to the first, their width a
// function of the head dim alone. Rows and columns beyond the sequence are 0.
//
// Made for being simple: a warp owns a row of it, a lane every 32nd key, whose score it sums up
// element by element.
#pragma once

#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "common/dmask_block.h"
#include "common/softmax.h"
#include "sm80/cache_place.h"
#include "sm80/dmask_params.h"
#include "sm80/query.h"

namespace flash::sm80 {

// One row of scores.
struct DmaskRow {
  int batch, head, query;
  Sequence seq;
  Mask mask;
};

template <Dtype kDtype>
FLASH_DEVICE float dot(const void* x, const void* y, int64_t n) {
  float sum = 0.f;
  for (int i = 0; i < n; ++i)
    sum = fmaf(to_float<kDtype>(static_cast<const uint16_t*>(x)[i]),
               to_float<kDtype>(static_cast<const uint16_t*>(y)[i]), sum);
  return sum;
}

// kDtype's or fp32.
template <Dtype kDtype>
FLASH_DEVICE float bias_of(const Bias& bias, const DmaskRow& row, int key) {
  const int64_t i = row.batch * bias.batch_stride + row.head * bias.head_stride +
                    row.query * bias.row_stride + key * bias.col_stride;
  if (bias.dtype == Dtype::kFloat32) return static_cast<const float*>(bias.ptr)[i];
  return to_float<kDtype>(static_cast<const uint16_t*>(bias.ptr)[i]);
}

// A natural logit.
template <Dtype kDtype>
FLASH_DEVICE float score_of(const DmaskParams& p, const DmaskLaunch& launch, const DmaskRow& row,
                            int key) {
  const KeyRange keys = row.mask.keys(row.query);
  if (key < keys.begin || key >= keys.end) return -INFINITY;
  IndexFaults faults = 0;
  const CachePlace place =
      place_of(row.seq, launch.page_size, p.k_entries, row.seq.leftpad + key, faults);
  float s = 0.f;
  if (faults == 0) {
    s = p.scale_softmax *
        dot<kDtype>(operand_row(p.q, kDtype, row.batch, row.seq.q_row + row.query, row.head),
                    operand_row(p.k, kDtype, place.entry, place.row, row.head / launch.group), p.d);
  }
  if (p.softcap > 0.f) s = p.softcap * tanhf(s / p.softcap);
  if (p.alibi_slopes != nullptr) {
    const int distance = row.query + row.mask.seqlen_k - row.mask.seqlen_q - key;
    s -= p.alibi_slopes[row.batch * p.alibi_batch_stride + row.head] *
         fabsf(static_cast<float>(distance));
  }
  if (p.bias.ptr != nullptr) s += bias_of<kDtype>(p.bias, row, key);
  return s;
}

// Whether dropout keeps a key's probability: common/dropout.h.
FLASH_DEVICE bool is_kept(const Dropout& dropout, uint32_t batch_head, int query, int key) {
  const Philox4 random = dropout.random(batch_head, query, key / 32, key % 8 / 2);
  const int word = key % 32 / 8;
  const uint32_t bytes = word == 0   ? random.x[0]
                         : word == 1 ? random.x[1]
                         : word == 2 ? random.x[2]
                                     : random.x[3];
  return (bytes >> (query / 8 % 2 * 16 + key % 2 * 8) & 255u) <= dropout.keep_threshold;
}

// One block of keys, from first_key to end_key - 1.
template <Dtype kDtype>
FLASH_DEVICE void store_block(const DmaskParams& p, const DmaskLaunch& launch, const DmaskRow& row,
                              RowState& running, int first_key, int end_key, uint16_t* out) {
  constexpr int kKeys = 4;  // of a lane
  const int lane = ptx::read_tid_x() % 32;
  float s[kKeys];
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int key = first_key + lane + 32 * i;
    s[i] = key < end_key ? score_of<kDtype>(p, launch, row, key) : -INFINITY;
    running.max = fmaxf(running.max, s[i]);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    running.max = fmaxf(running.max, __shfl_xor_sync(0xffffffffu, running.max, distance));
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int key = first_key + lane + 32 * i;
    if (key >= end_key) continue;
    const float probability = expf(s[i] - running.anchor());
    const auto batch_head = static_cast<uint32_t>(row.batch * p.h + row.head);
    const bool kept = is_kept(launch.dropout, batch_head, row.query, key);
    out[key] = from_float<kDtype>(kept ? probability : -probability);
  }
}

template <RowConfig C>
FLASH_DEVICE void dmask(const DmaskParams& p, const DmaskLaunch& launch) {
  const int64_t number =
      (static_cast<int64_t>(ptx::read_ctaid_x()) * C.threads() + threadIdx.x) / 32;
  if (number >= launch.rows) return;
  const int64_t batch_head = number / p.seqlen_q_rounded;
  DmaskRow row{static_cast<int>(batch_head / p.h), static_cast<int>(batch_head % p.h),
               static_cast<int>(number % p.seqlen_q_rounded)};
  IndexFaults faults;  // the forward reports them
  row.seq = bounded_sequence(p, row.batch, launch.bounds.max_cached, faults);
  row.mask = mask_of(p, row.seq);

  auto* out = static_cast<uint16_t*>(p.s_dmask) + number * p.seqlen_k_rounded;
  const int seqlen_k = row.query < row.seq.seqlen_q ? row.seq.seqlen_k : 0;
  for (int key = seqlen_k + ptx::read_tid_x() % 32; key < p.seqlen_k_rounded; key += 32)
    out[key] = 0;
  const int block = dmask_block_keys(p.d);
  RowState running;
  for (int first = (seqlen_k - 1) / block * block; first >= 0 && first < seqlen_k; first -= block)
    store_block<C.dtype>(p, launch, row, running, first, min(first + block, seqlen_k), out);
}

}  // namespace flash::sm80
