// ds_aux. A sink is a key with value 0: its gradient is the sum over queries of exp(sink - lse) (0
// - delta), or of what far rows have in the place of lse. A CTA sums up a head, in an order of its
// own.
#pragma once

#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "common/bounded_sequence.h"
#include "warp/bwd_params.h"
#include "warp/sink.h"

namespace flash::sm80 {

// A sink's weight in a row.
FLASH_DEVICE float sink_weight(float sink, float lse, const BwdPrepareLaunch& launch,
                               const Sequence& seq, int head, int query) {
  if (!(fabsf(lse) > kFarLse)) return __expf(sink - lse);
  const RowReference reference = launch.references.at(seq, head, query);
  return __expf(fmaf(-reference.score, launch.scale, sink) - reference.log_sum);
}

template <RowConfig C>
FLASH_DEVICE void sink_gradient(const BwdParams& p, const BwdPrepareLaunch& launch) {
  const int head = ptx::read_ctaid_x();
  const float sink = sink_logit(p, head);
  float sum = 0.f;
  for (int batch = 0; batch < p.b; ++batch) {
    IndexFaults faults;  // the main kernel reports them
    const Sequence seq = bounded_sequence(p, batch, launch.bounds.max_cached, faults);
    const float* lse =
        p.softmax_lse + batch * p.lse_batch_stride + head * p.lse_head_stride + seq.lse_row;
    const int64_t first = p.cu_seqlens_q == nullptr ? 0 : seq.lse_row + 128 * int64_t{batch};
    const float* delta =
        p.dsoftmax_sum + batch * p.dsoftmax_batch_stride + head * p.dsoftmax_head_stride + first;
    for (int i = threadIdx.x; i < seq.seqlen_q; i += C.threads())
      sum -= sink_weight(sink, lse[i], launch, seq, head, i) * delta[i];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  __shared__ float sums[C.threads() / 32];
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total = 0.f;
  for (const float x : sums) total += x;
  p.ds_aux[head] = total;
}

}  // namespace flash::sm80
