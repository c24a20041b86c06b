// From checked arguments to a launch.
#include <algorithm>

#include "base/cuda_driver/device.h"
#include "common/bounded_sequence.h"
#include "common/operand_views.h"
#include "hopper/fwd_params.h"
#include "hopper/heuristics.h"
#include "hopper/hopper_backend.h"
#include "hopper/launch.h"
#include "warp/launch_plan.h"

namespace flash::hopper {
namespace {

bool has_tiles(const Flash_fwd_params& p) {
  return p.cu_seqlens_q != nullptr ? p.total_q > 0 : p.b > 0 && p.seqlen_q > 0;
}

void plan_maps(const Flash_fwd_params& p, const FwdConfig& config, const Tile& tile,
               FwdLaunch& launch) {
  const OperandViews views = operand_views(p);
  const cuda::Device& device = *p.target.device;
  launch.q = map_of(device, views.q, config.head_dim, tile.m(), "q");
  // Without keys, of anything: no kernel copies any.
  const auto keys_or_q = [&](const StridedView& x) { return is_empty(x) ? views.q : x; };
  launch.k = map_of(device, keys_or_q(views.k), config.head_dim, launch.box_keys, "k");
  launch.v = map_of(device, keys_or_q(views.v), config.head_dim_v, launch.box_keys, "v");
  launch.o = map_of(device, views.o, config.head_dim_v, kWarpgroupRows, "out");
}

// Clusters that run at a time; at least one.
int64_t cluster_slots(const Flash_fwd_params& p, const FwdKernel& kernel, const Tile& tile) {
  const int64_t ctas = p.target.device->cta_slots(1, kernel.shared_bytes);
  return std::max<int64_t>(ctas / tile.cluster, 1);
}

struct Plan {
  const FwdKernel& kernel;
  const Tile& tile;
  Tile_scheduler scheduler;
  int64_t ctas;
  bool counts_tiles;

  explicit Plan(const Flash_fwd_params& p)
      : kernel(choose(p)),
        tile(tile_of(kernel.config.dtype, kernel.config.head_dim, kernel.config.head_dim_v,
                     kernel.config.scores)),
        scheduler(schedule(p, tile, p.target.device->l2_cache_bytes())),
        ctas(tile.cluster * std::min(scheduler.tiles(), cluster_slots(p, kernel, tile))),
        counts_tiles(takes_tiles_by_counter(p, scheduler.tiles(), ctas)) {}
};

}  // namespace

size_t mha_fwd_workspace_bytes(const Flash_fwd_params& p) {
  return has_tiles(p) && Plan(p).counts_tiles ? sizeof(uint32_t) : 0;
}

void mha_fwd(const Flash_fwd_params& p) {
  if (!has_tiles(p)) return;
  const Plan plan(p);
  FwdLaunch launch{};
  plan_attention(p, {max_cached(p, p, p), p.target.device->mailbox()}, launch);
  launch.box_keys = box_keys(p, plan.tile);
  plan_maps(p, plan.kernel.config, plan.tile, launch);
  launch.scheduler = plan.scheduler;
  if (plan.counts_tiles) {
    launch.next_tile = static_cast<uint32_t*>(p.workspace.ptr);
    p.target.device->clear(launch.next_tile, 1, p.target.stream);
  }
  launch.heads = static_cast<int>(p.h);
  launch.group = static_cast<int>(p.h / p.h_k);
  launch.is_packed = p.cu_seqlens_q != nullptr;
  launch.rows_end_inside = p.cu_seqlens_k != nullptr || p.seqused_k != nullptr;
  launch.inspects_v = launch.rows_end_inside || p.window_left >= 0 || p.window_right >= 0;
  launch.dropout = Dropout::make(p.p_dropout, p.seed, p.offset);
  FwdParams params{p, p, p, p, p};
  void* args[] = {&params, &launch};
  p.target.device->launch(
      plan.kernel.image,
      {static_cast<unsigned>(plan.ctas), static_cast<unsigned>(plan.kernel.threads),
       static_cast<unsigned>(plan.kernel.shared_bytes)},
      p.target.stream, args);
}

}  // namespace flash::hopper
