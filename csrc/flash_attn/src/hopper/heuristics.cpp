#include "hopper/heuristics.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "hopper/hopper_backend.h"
#include "hopper/launch.h"
#include "warp/launch_plan.h"
#include "warp/packed_tiles.h"

namespace flash::hopper {

namespace {

const Tile& choose_tile(const Flash_fwd_params& p) {
  if (modifies_scores(p) || p.p_dropout > 0.f)
    return tile_of(p.dtype, p.d, p.d_v, ScoreClass::kModified);
  const bool has_other_lengths = p.cu_seqlens_q != nullptr || p.cu_seqlens_k != nullptr ||
                                 p.seqused_k != nullptr || p.block_table != nullptr;
  if (p.window_left < 0 && p.window_right < 0 && !has_other_lengths) {
    const Tile& tile = tile_of(p.dtype, p.d, p.d_v, ScoreClass::kUnmasked);
    // No CTA of a cluster shall be without queries.
    if ((p.seqlen_q + tile.m() - 1) / tile.m() % tile.cluster == 0) return tile;
  }
  return tile_of(p.dtype, p.d, p.d_v, ScoreClass::kMasked);
}

}  // namespace

const FwdKernel& choose(const Flash_fwd_params& p) {
  const Tile& tile = choose_tile(p);
  const FwdConfig wanted{p.dtype, tile.head_dim, tile.head_dim_v, tile.scores};
  return *std::find_if(kFwdKernels.begin(), kFwdKernels.end(),
                       [&](const FwdKernel& kernel) { return kernel.config == wanted; });
}

Tile_scheduler schedule(const Flash_fwd_params& p, const Tile& tile, int64_t l2_cache_bytes) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  const int64_t m = tile.m() * tile.cluster;
  const int64_t m_blocks = is_packed ? packed_tiles(p.total_q, p.b, m) : (p.seqlen_q + m - 1) / m;
  const int64_t heads = is_packed ? p.h : p.b * p.h;
  // With the tiles that CTAs ask for beyond the last.
  require(m_blocks * heads <= std::numeric_limits<int>::max() / 2,
          "batch_size * num_heads * seqlen_q is too large");
  const int64_t rows = is_packed ? p.total_k : p.seqlen_k;
  const int64_t kv_bytes = rows * (p.d + p.d_v) * dtype_bytes(p.dtype);
  // Half of the cache: queries and outputs pass through it too.
  return {static_cast<int>(m_blocks), static_cast<int>(heads),
          section_of(heads, p.h / p.h_k, kv_bytes, l2_cache_bytes / 2)};
}

int box_keys(const Flash_fwd_params& p, const Tile& tile) {
  if (p.block_table == nullptr) return tile.box_keys();
  return static_cast<int>(std::gcd(p.page_size, tile.n));
}

bool takes(const Flash_fwd_params& p) {
  // Factors of e4m3 are for blocks that begin with the rows, not the keys.
  const bool has_blocks = p.k_descale.block_stride != 0 || p.v_descale.block_stride != 0;
  if (p.leftpad_k != nullptr && has_blocks) return false;
  if (p.block_table == nullptr) return true;
  return p.leftpad_k == nullptr && box_keys(p, choose_tile(p)) % kSwizzledRows == 0;
}

bool takes_tiles_by_counter(const Flash_fwd_params& p, int64_t tiles, int64_t ctas) {
  const bool differ = p.window_left >= 0 || p.window_right >= 0 || p.cu_seqlens_q != nullptr ||
                      p.seqused_k != nullptr;
  return differ && tiles > ctas;
}

}  // namespace flash::hopper
