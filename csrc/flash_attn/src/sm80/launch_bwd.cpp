// From checked arguments to the backward's launches.
#include <algorithm>
#include <limits>
#include <span>

#include "base/cuda_driver/device.h"
#include "sm80/bwd_params.h"
#include "sm80/kernel_list.h"
#include "sm80/launch.h"
#include "sm80/sm80_backend.h"
#include "warp/bwd_plan.h"

namespace flash::sm80 {
namespace {

bool has(const BwdKernel& kernel, const Flash_bwd_params& p) {
  const bool is_modified = modifies_scores(p) || p.p_dropout > 0.f;
  return kernel.config.dtype == p.dtype && kernel.tile.head_dim >= std::max(p.d, p.d_v) &&
         (!is_modified || kernel.tile.scores == ScoreClass::kModified) &&
         kernel.shared_bytes <= p.target.device->max_shared_bytes();
}

const BwdKernel& choose(std::span<const BwdKernel> kernels, const Flash_bwd_params& p) {
  return *std::find_if(kernels.begin(), kernels.end(),
                       [&](const BwdKernel& kernel) { return has(kernel, p); });
}

BwdBlocks blocks_of(const BwdTile& tile) { return {tile.m, tile.n, tile.head_dim, tile.warps}; }

BwdLaunch plan(const Flash_bwd_params& p, const BwdCut& c, const BwdTile& tile) {
  BwdLaunch launch{};
  static_cast<BwdScale&>(launch) = scale_of(p);
  static_cast<BwdTiles&>(launch) = plan_bwd_tiles(p, c, blocks_of(tile), index_bounds(p));
  launch.q_aligned = is_aligned(p.q, p.d);
  launch.k_aligned = is_aligned(p.k, p.d);
  launch.v_aligned = is_aligned(p.v, p.d_v);
  launch.dout_aligned = is_aligned(p.dout, p.d_v);
  launch.dk_aligned = is_aligned(p.dk, p.d);
  launch.dv_aligned = is_aligned(p.dv, p.d_v);
  launch.dq_aligned = is_aligned_to_pairs(p.dq);
  launch.dropout = Dropout::make(p.p_dropout, p.seed, p.offset);
  return launch;
}

void launch(const BwdKernel& kernel, int64_t ctas, BwdParams& params, BwdLaunch& plan,
            const Target& target) {
  void* args[] = {&params, &plan};
  target.device->launch(kernel.image,
                        {static_cast<unsigned>(ctas), static_cast<unsigned>(kernel.threads),
                         static_cast<unsigned>(kernel.shared_bytes)},
                        target.stream, args);
}

// Of the bias, each dimension that it has cut into blocks.
void store_bias_gradient(const Flash_bwd_params& p, BwdParams& params) {
  const BwdKernel& kernel = choose(kBiasGradientKernels, p);
  const BwdTile& tile = kernel.tile;
  const Bias& x = p.dbias;
  const int64_t ctas =
      x.b * x.h * ((x.rows + tile.m - 1) / tile.m) * ((x.cols + tile.n - 1) / tile.n);
  require(ctas <= std::numeric_limits<int>::max(), "attn_bias is too large");
  BwdLaunch launch_plan = plan(p, cut(p, blocks_of(tile)), tile);
  if (ctas > 0) launch(kernel, ctas, params, launch_plan, p.target);
}

void prepare(const Flash_bwd_params& p, BwdParams& params) {
  const Target& target = p.target;
  prepare_bwd(
      p, params, index_bounds(p),
      [&](uint32_t* words, size_t count) { target.device->clear(words, count, target.stream); },
      [&](int64_t threads, void** args) {
        launch_rows(cuda::kernel_of(kBwdPrepareKernels, p.dtype), threads, target, args);
      });
}

}  // namespace

void store_sink_gradient(const Flash_bwd_params& p) {
  BwdParams params{p, p, p, p};
  BwdPrepareLaunch launch = plan_prepare(p, index_bounds(p));
  void* args[] = {&params, &launch};
  launch_rows(kernel_of(kSinkGradientKernels, Dtype::kFloat32), p.h * RowConfig::threads(),
              p.target, args);
}

size_t mha_bwd_workspace_bytes(const Flash_bwd_params& p) {
  return p.b == 0 ? 0 : bwd_workspace_bytes(p, blocks_of(choose(kBwdKernels, p).tile));
}

void mha_bwd(const Flash_bwd_params& p) {
  BwdParams params{p, p, p, p};
  prepare(p, params);
  if (p.ds_aux != nullptr) store_sink_gradient(p);
  if (p.dbias.ptr != nullptr) store_bias_gradient(p, params);
  const BwdKernel& kernel = choose(kBwdKernels, p);
  const BwdBlocks blocks = blocks_of(kernel.tile);
  const BwdCut c = cut(p, blocks);
  if (c.key_blocks * c.heads_k == 0) return;
  BwdLaunch launch_plan = plan(p, c, kernel.tile);
  if (launch_plan.turns != nullptr)
    p.target.device->clear(launch_plan.turns, turn_count(c, blocks), p.target.stream);
  launch(kernel, launch_plan.scheduler.tiles(), params, launch_plan, p.target);
}

}  // namespace flash::sm80
