// From checked arguments to a launch.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/cuda_driver/device.h"
#include "sm80/fwd_params.h"
#include "sm80/kernel_list.h"
#include "sm80/launch.h"
#include "sm80/sm80_backend.h"
#include "sm80/smem.h"

namespace flash::sm80 {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

bool modifies_scores(const ScoreParams& p) {
  return p.softcap > 0.f || p.alibi_slopes != nullptr || p.bias.ptr != nullptr;
}

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

// The unit of scores. At least the smallest normal, so that -inf stays -inf.
void plan_scale(const Flash_fwd_params& p, FwdLaunch& launch) {
  launch.modifies_scores = modifies_scores(p);
  const float scale = launch.modifies_scores ? 1.f : std::fabs(p.scale_softmax);
  launch.negate_q = !launch.modifies_scores && p.scale_softmax < 0.f;
  launch.scale = std::max(scale, std::numeric_limits<float>::min());
  launch.scale_log2 = std::max(launch.scale * kLog2e, std::numeric_limits<float>::min());
}

FwdLaunch plan(const Flash_fwd_params& p, const Tile& tile, int64_t l2_cache_bytes) {
  // Packed batches may have rows that belong to no sequence.
  const int64_t m_blocks = std::max<int64_t>((p.seqlen_q + tile.m - 1) / tile.m, 1);
  const int64_t heads = (p.b + (p.cu_seqlens_q != nullptr ? 1 : 0)) * p.h;
  require(m_blocks * heads <= std::numeric_limits<int>::max(),
          "batch_size * num_heads * seqlen_q is too large");
  FwdLaunch launch{};
  launch.heads = static_cast<int>(p.h);
  launch.group = static_cast<int>(p.h / p.h_k);
  const int64_t kv_bytes = p.seqlen_k * (p.d + p.d_v) * dtype_bytes(p.dtype);
  // Half of the cache: queries and outputs pass through it too.
  launch.scheduler = {static_cast<int>(m_blocks), static_cast<int>(heads),
                      section_of(heads, launch.group, kv_bytes, l2_cache_bytes / 2)};
  plan_scale(p, launch);
  launch.q_aligned = is_aligned(p.q, p.d);
  launch.k_aligned = is_aligned(p.k, p.d);
  launch.v_aligned = is_aligned(p.v, p.d_v);
  launch.o_aligned = is_aligned(p.o, p.d_v);
  if (p.block_table != nullptr) launch.page_size = FastDivide::by(static_cast<int>(p.page_size));
  launch.dropout = Dropout::make(p.p_dropout, p.seed, p.offset);
  launch.bounds = index_bounds(p);
  return launch;
}

void attend(const Flash_fwd_params& p) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  if (is_packed ? p.total_q == 0 : p.b == 0 || p.seqlen_q == 0) return;
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
  if (p.knew.ptr != nullptr) append_kv(p);
  attend(p);
  if (p.s_dmask != nullptr) store_dmask(p);
}

}  // namespace flash::sm80
