// From checked arguments to a launch.
#include <algorithm>
#include <limits>

#include "base/cuda_driver/device.h"
#include "sm80/fwd_params.h"
#include "sm80/kernel_list.h"
#include "sm80/launch.h"
#include "sm80/launch_decode.h"
#include "sm80/sm80_backend.h"
#include "warp/launch_plan.h"
#include "warp/packed_tiles.h"

namespace flash::sm80 {
namespace {

ScoreClass score_class(const Flash_fwd_params& p) {
  if (modifies_scores(p) || p.p_dropout > 0.f) return ScoreClass::kModified;
  return p.window_left < 0 && p.window_right < 0 ? ScoreClass::kUnmasked : ScoreClass::kMasked;
}

const FwdKernel& choose(const Flash_fwd_params& p) {
  const Tile& tile = tile_of(p.d, p.d_v, score_class(p));
  const FwdConfig wanted{p.dtype, tile.head_dim, tile.head_dim_v, tile.scores};
  return *std::find_if(kFwdKernels.begin(), kFwdKernels.end(),
                       [&](const FwdKernel& kernel) { return kernel.config == wanted; });
}

// Tiles of one head, and heads of all sequences; of a packed batch the kernel finds the sequences.
Tile_scheduler schedule(const Flash_fwd_params& p, const Tile& tile, int64_t l2_cache_bytes) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  const int64_t m_blocks =
      is_packed ? packed_tiles(p.total_q, p.b, tile.m) : (p.seqlen_q + tile.m - 1) / tile.m;
  const int64_t heads = is_packed ? p.h : p.b * p.h;
  require(m_blocks * heads <= std::numeric_limits<int>::max(),
          "batch_size * num_heads * seqlen_q is too large");
  const int64_t rows = is_packed ? p.total_k : p.seqlen_k;
  const int64_t kv_bytes = rows * (p.d + p.d_v) * dtype_bytes(p.dtype);
  // Half of the cache: queries and outputs pass through it too.
  return {static_cast<int>(m_blocks), static_cast<int>(heads),
          section_of(heads, p.h / p.h_k, kv_bytes, l2_cache_bytes / 2)};
}

FwdLaunch plan(const Flash_fwd_params& p, const Tile& tile, int64_t l2_cache_bytes) {
  FwdLaunch launch{};
  plan_attention(p, index_bounds(p), launch);
  launch.scheduler = schedule(p, tile, l2_cache_bytes);
  launch.heads = static_cast<int>(p.h);
  launch.group = static_cast<int>(p.h / p.h_k);
  launch.dropout = Dropout::make(p.p_dropout, p.seed, p.offset);
  return launch;
}

void attend(const Flash_fwd_params& p) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  if (is_packed ? p.total_q == 0 : p.b == 0 || p.seqlen_q == 0) return;
  if (takes_decode(p)) return launch_decode(p);
  const FwdKernel& kernel = choose(p);
  FwdParams params{p, p, p, p};
  FwdLaunch launch =
      plan(p, tile_of(p.d, p.d_v, score_class(p)), p.target.device->l2_cache_bytes());
  void* args[] = {&params, &launch};
  p.target.device->launch(
      kernel.image,
      {static_cast<unsigned>(launch.scheduler.tiles()), static_cast<unsigned>(kernel.threads),
       static_cast<unsigned>(kernel.shared_bytes)},
      p.target.stream, args);
}

}  // namespace

void mha_fwd(const Flash_fwd_params& p) {
  if (p.knew.ptr != nullptr && !decode_appends(p)) append_kv(p);
  attend(p);
  if (p.s_dmask != nullptr) store_dmask(p);
}

}  // namespace flash::sm80
