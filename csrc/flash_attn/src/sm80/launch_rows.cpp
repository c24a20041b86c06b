// Launches of kernels that work row by row.
#include <algorithm>
#include <bit>
#include <cstdlib>

#include "sm80/append_params.h"
#include "sm80/dmask_params.h"
#include "sm80/fwd_params.h"
#include "sm80/launch.h"
#include "sm80/sm80_backend.h"
#include "warp/decode_cut.h"
#include "warp/launch_plan.h"
#include "warp/smem_tile.h"

namespace flash::sm80 {
namespace {

constexpr int kWarp = 32;

}  // namespace

IndexBounds index_bounds(const Flash_fwd_params& p) {
  return {max_cached(p, p, p), p.target.device->mailbox()};
}

IndexBounds index_bounds(const Flash_bwd_params& p) {
  return {max_cached(p, p, {}), p.target.device->mailbox()};
}

AppendPlan plan_append(const Flash_fwd_params& p) {
  AppendPlan plan{};
  const auto chunks =
      static_cast<uint64_t>(std::max(p.d, p.d_v) + kChunkElements - 1) / kChunkElements;
  plan.lanes = static_cast<int>(std::min<uint64_t>(std::bit_ceil(chunks), 32));
  // One cache's rows within the other's are checked to get parts of the other's new rows.
  const int64_t distance =
      (reinterpret_cast<intptr_t>(p.v.ptr) - reinterpret_cast<intptr_t>(p.k.ptr)) / kElementBytes;
  const bool same = same_rows(p, p.k, p.v);
  const bool v_within_k = same && distance >= 0 && distance + p.d_v <= p.d;
  plan.writes_v = !v_within_k;
  plan.writes_k = v_within_k || !(same && distance <= 0 && p.d - distance <= p.d_v);
  plan.k_aligned = is_aligned(p.k, p.d) && is_aligned(p.knew, p.d);
  plan.v_aligned = is_aligned(p.v, p.d_v) && is_aligned(p.vnew, p.d_v);
  return plan;
}

void append_kv(const Flash_fwd_params& p) {
  AppendLaunch launch{plan_append(p), p.b * p.seqlen_knew * p.h_k, page_size(p), index_bounds(p)};
  if (launch.rows == 0) return;
  FwdParams params{p, p, p, p};
  void* args[] = {&params, &launch};
  launch_rows(kernel_of(kAppendKernels, p.dtype), 2 * launch.rows * launch.lanes, p.target, args);
}

void store_dmask(const Flash_fwd_params& p) {
  DmaskLaunch launch{p.b * p.h * p.seqlen_q_rounded, static_cast<int>(p.h / p.h_k), page_size(p),
                     Dropout::make(p.p_dropout, p.seed, p.offset), index_bounds(p)};
  if (launch.rows == 0) return;
  DmaskParams params{p, p, p, p};
  void* args[] = {&params, &launch};
  launch_rows(kernel_of(kDmaskKernels, p.dtype), kWarp * launch.rows, p.target, args);
}

void combine(const Combine_params& p) {
  const int64_t rows = p.b * p.s * p.h;
  if (rows == 0) return;
  Combine_params params = p;
  void* args[] = {&params};
  launch_rows(kernel_of(kCombineKernels, Dtype::kFloat32), kWarp * rows, p.target, args);
}

}  // namespace flash::sm80
