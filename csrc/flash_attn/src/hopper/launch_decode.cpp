// From checked arguments to a launch of the decode kernel.
#include <algorithm>
#include <numeric>

#include "base/cuda_driver/device.h"
#include "base/cuda_driver/tensor_map.h"
#include "common/bounded_sequence.h"
#include "common/operand_views.h"
#include "hopper/decode_params.h"
#include "hopper/hopper_backend.h"
#include "hopper/kernel_list.h"
#include "hopper/launch.h"
#include "warp/decode_cut.h"
#include "warp/smem_tile.h"

namespace flash::hopper {
namespace {

// Of fewer rows sm80's kernel, whose tiles have so many, reads each key once too, and memory bounds
// it.
constexpr int64_t kRowsOfSm80 = 16;

const DecodeTile* find_tile(const Flash_fwd_params& p) {
  const auto* const end = std::end(kDecodeTiles);
  const auto* const found = std::find_if(std::begin(kDecodeTiles), end, [&](const DecodeTile& t) {
    return t.head_dim >= p.d && t.head_dim_v >= p.d_v && (!t.v_within_k || is_v_within_k(p));
  });
  return found == end ? nullptr : found;
}

const DecodeKernel& choose(const Flash_fwd_params& p) {
  const DecodeTile& tile = *find_tile(p);
  const DecodeConfig wanted{p.dtype, tile.head_dim, tile.head_dim_v};
  return *std::find_if(kDecodeKernels.begin(), kDecodeKernels.end(),
                       [&](const DecodeKernel& kernel) { return kernel.config == wanted; });
}

// Rows of K and V that one TMA instruction copies; 0 where pages are smaller than what its
// permutation goes by, or keys begin within one.
int box_keys(const Flash_fwd_params& p, const DecodeTile& tile) {
  if (p.block_table == nullptr) return tile.n;
  const int rows = static_cast<int>(std::gcd<int64_t>(p.page_size, tile.n));
  return p.leftpad_k == nullptr && rows % kSwizzledRows == 0 ? rows : 0;
}

DecodeCut cut(const Flash_fwd_params& p, const DecodeKernel& kernel) {
  const DecodeTile& tile = kernel.tile;
  return {p,
          {kWarpgroupRows, tile.block_keys(), tile.units,
           p.target.device->cta_slots(tile.ctas_per_sm, kernel.shared_bytes)}};
}

int kept_warps(const DecodeCut& c) {
  return static_cast<int>((std::min<int64_t>(c.rows, kWarpgroupRows) + 15) / 16);
}

// Of a tile: all, or, where they are merged in the workspace, the total.
int kept_units(const DecodeCut& c, const DecodeTile& tile) {
  if (c.is_shared()) return c.max_units;
  return !tile.total_in_shared && c.max_units > 1 ? 1 : 0;
}

UnitStorage storage(const DecodeCut& c, const DecodeTile& tile) {
  return {c.tiles() * kept_units(c, tile) * kept_warps(c) * 16, tile.head_dim_v,
          c.is_shared() ? c.tiles() : 0};
}

DecodeLaunch plan(const Flash_fwd_params& p, const DecodeCut& c, const DecodeTile& tile) {
  DecodeLaunch launch{};
  plan_decode(p, c, {max_cached(p, p, p), p.target.device->mailbox()}, launch);
  launch.box_keys = box_keys(p, tile);
  launch.kept_units = kept_units(c, tile);
  launch.kept_warps = kept_warps(c);
  if (launch.kept_units > 0) storage(c, tile).place(p.workspace.ptr, launch);
  if (launch.box_keys > 0) {
    const OperandViews views = operand_views(p);
    launch.k = map_of(*p.target.device, views.k, tile.head_dim, launch.box_keys, "k");
    launch.v = map_of(*p.target.device, views.v, tile.head_dim_v, launch.box_keys, "v");
  }
  return launch;
}

}  // namespace

bool takes_decode(const Flash_fwd_params& p) {
  const DecodeTile* const tile = find_tile(p);
  if (tile == nullptr || query_rows(p) <= kRowsOfSm80) return false;
  if (p.p_dropout > 0.f || p.bias.ptr != nullptr) return false;
  return box_keys(p, *tile) > 0 || (is_aligned(p.k, p.d) && is_aligned(p.v, p.d_v));
}

size_t mha_decode_workspace_bytes(const Flash_fwd_params& p) {
  if (p.b == 0) return 0;
  const DecodeKernel& kernel = choose(p);
  return storage(cut(p, kernel), kernel.tile).bytes();
}

void mha_decode(const Flash_fwd_params& p) {
  if (p.cu_seqlens_q != nullptr ? p.total_q == 0 : p.b == 0) return;
  const DecodeKernel& kernel = choose(p);
  const DecodeCut c = cut(p, kernel);
  FwdParams params{p, p, p, p, p};
  DecodeLaunch launch = plan(p, c, kernel.tile);
  if (c.is_shared())
    p.target.device->clear(launch.arrivals, static_cast<size_t>(c.tiles()), p.target.stream);
  void* args[] = {&params, &launch};
  p.target.device->launch(kernel.image,
                          {static_cast<unsigned>(c.ctas()), static_cast<unsigned>(kernel.threads),
                           static_cast<unsigned>(kernel.shared_bytes)},
                          p.target.stream, args);
}

}  // namespace flash::hopper
