// From checked arguments to the backward's launches.
#include <algorithm>

#include "base/cuda_driver/device.h"
#include "base/cuda_driver/tensor_map.h"
#include "common/bounded_sequence.h"
#include "common/operand_views.h"
#include "hopper/bwd_params.h"
#include "hopper/hopper_backend.h"
#include "hopper/kernel_list.h"
#include "hopper/launch.h"
#include "warp/bwd_plan.h"

namespace flash::hopper {
namespace {

const BwdKernel& choose(const Flash_bwd_params& p) {
  return *std::find_if(kBwdKernels.begin(), kBwdKernels.end(), [&](const BwdKernel& kernel) {
    return kernel.config.dtype == p.dtype && kernel.tile.head_dim >= std::max(p.d, p.d_v);
  });
}

BwdBlocks blocks_of(const BwdTile& tile) { return {tile.m, tile.n, tile.head_dim, kBwdWarpgroups}; }

IndexBounds index_bounds(const Flash_bwd_params& p) {
  return {max_cached(p, p, {}), p.target.device->mailbox()};
}

BwdLaunch plan(const Flash_bwd_params& p, const BwdCut& c, const BwdTile& tile) {
  BwdLaunch launch{};
  static_cast<BwdScale&>(launch) = scale_of(p);
  static_cast<BwdTiles&>(launch) = plan_bwd_tiles(p, c, blocks_of(tile), index_bounds(p));
  const OperandViews views = operand_views(p);
  const cuda::Device& device = *p.target.device;
  launch.q = map_of(device, views.q, tile.head_dim, tile.m, "q");
  launch.k = map_of(device, views.k, tile.head_dim, tile.n, "k");
  launch.v = map_of(device, views.v, tile.head_dim, tile.n, "v");
  launch.dout = map_of(device, dout_view(p, p.dout), tile.head_dim, tile.m, "dout");
  launch.is_packed = c.is_packed;
  launch.dk_aligned = is_aligned(p.dk, p.d);
  launch.dv_aligned = is_aligned(p.dv, p.d_v);
  launch.dq_aligned = is_aligned_to_pairs(p.dq);
  return launch;
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

bool takes(const Flash_bwd_params& p) {
  return std::max(p.d, p.d_v) <= kMaxBwdHeadDim && !modifies_scores(p) && p.p_dropout == 0.f &&
         p.dbias.ptr == nullptr && can_map(dout_view(p, p.dout));
}

size_t mha_bwd_workspace_bytes(const Flash_bwd_params& p) {
  return p.b == 0 ? 0 : bwd_workspace_bytes(p, blocks_of(choose(p).tile));
}

void mha_bwd(const Flash_bwd_params& p) {
  BwdParams params{p, p, p, p};
  prepare(p, params);
  const BwdKernel& kernel = choose(p);
  const BwdBlocks blocks = blocks_of(kernel.tile);
  const BwdCut c = cut(p, blocks);
  if (c.key_blocks * c.heads_k == 0) return;
  BwdLaunch launch = plan(p, c, kernel.tile);
  if (launch.turns != nullptr)
    p.target.device->clear(launch.turns, turn_count(c, blocks), p.target.stream);
  void* args[] = {&params, &launch};
  p.target.device->launch(
      kernel.image,
      {static_cast<unsigned>(launch.scheduler.tiles()), static_cast<unsigned>(kernel.threads),
       static_cast<unsigned>(kernel.shared_bytes)},
      p.target.stream, args);
}

}  // namespace flash::hopper
