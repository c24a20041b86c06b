#include "sm80/launch_decode.h"

#include <algorithm>

#include "base/cuda_driver/device.h"
#include "sm80/decode_params.h"
#include "sm80/kernel_list.h"
#include "sm80/launch.h"
#include "sm80/sm80_backend.h"
#include "warp/decode_cut.h"

namespace flash::sm80 {
namespace {

// Of more rows the prefill kernel reads keys less often; of fewer keys there is little to share.
constexpr int64_t kMaxDecodeRows = 64;
constexpr int64_t kMinDecodeKeys = 512;

// More new rows are appended sooner by a launch of their own, with many CTAs.
constexpr int64_t kMaxNewRows = 16;

// Of a cache only the capacity is known here.
bool is_cache_call(const Flash_fwd_params& p) {
  return p.cu_seqlens_q == nullptr &&
         (p.seqused_k != nullptr || p.block_table != nullptr || p.cache_batch_idx != nullptr ||
          p.leftpad_k != nullptr || p.knew.ptr != nullptr);
}

const DecodeKernel& choose(const Flash_fwd_params& p) {
  const DecodeTile& tile = decode_tile_of(p.d, p.d_v);
  const DecodeConfig wanted{p.dtype, tile.head_dim, tile.head_dim_v};
  return *std::find_if(kDecodeKernels.begin(), kDecodeKernels.end(),
                       [&](const DecodeKernel& kernel) { return kernel.config == wanted; });
}

DecodeCut cut(const Flash_fwd_params& p, const DecodeKernel& kernel) {
  return {p,
          {kDecodeRows,
           kernel.block_keys,
           {},
           p.target.device->cta_slots(kernel.ctas_per_sm, kernel.shared_bytes)}};
}

int64_t unit_rows(const DecodeCut& c) { return std::min<int64_t>(c.rows, kDecodeRows); }

UnitStorage storage(const DecodeCut& c, const DecodeKernel& kernel) {
  if (!c.is_shared()) return {0, 0, 0};
  return {c.tiles() * c.max_units * unit_rows(c), kernel.config.head_dim_v, c.tiles()};
}

DecodeLaunch plan(const Flash_fwd_params& p, const DecodeCut& c, const DecodeKernel& kernel) {
  DecodeLaunch launch{};
  plan_decode(p, c, index_bounds(p), launch);
  launch.v_within_k = is_v_within_k(p);
  launch.dropout = Dropout::make(p.p_dropout, p.seed, p.offset);
  launch.unit_rows = static_cast<int>(unit_rows(c));
  if (p.knew.ptr != nullptr && decode_appends(p)) {
    launch.new_rows = static_cast<int>(p.seqlen_knew);
    launch.append = plan_append(p);
  }
  if (c.is_shared()) storage(c, kernel).place(p.workspace.ptr, launch);
  return launch;
}

}  // namespace

bool takes_decode(const Flash_fwd_params& p) {
  const int64_t rows = query_rows(p);
  if (decode_tile_of(p.d, p.d_v).warps_share_keys) return true;
  return rows > 0 && rows <= kMaxDecodeRows && (p.seqlen_k >= kMinDecodeKeys || is_cache_call(p)) &&
         p.p_dropout == 0.f && p.bias.ptr == nullptr;
}

bool decode_appends(const Flash_fwd_params& p) {
  const int64_t rows = query_rows(p);
  return takes_decode(p) && 0 < rows && rows <= kDecodeRows && p.seqlen_knew <= kMaxNewRows;
}

size_t mha_fwd_workspace_bytes(const Flash_fwd_params& p) {
  if (p.b == 0 || !takes_decode(p)) return 0;
  const DecodeKernel& kernel = choose(p);
  return storage(cut(p, kernel), kernel).bytes();
}

void launch_decode(const Flash_fwd_params& p) {
  const DecodeKernel& kernel = choose(p);
  const DecodeCut c = cut(p, kernel);
  FwdParams params{p, p, p, p};
  DecodeLaunch launch = plan(p, c, kernel);
  if (c.is_shared())
    p.target.device->clear(launch.arrivals, static_cast<size_t>(c.tiles()), p.target.stream);
  void* args[] = {&params, &launch};
  p.target.device->launch(kernel.image,
                          {static_cast<unsigned>(c.ctas()), static_cast<unsigned>(kernel.threads),
                           static_cast<unsigned>(kernel.shared_bytes)},
                          p.target.stream, args);
}

}  // namespace flash::sm80
