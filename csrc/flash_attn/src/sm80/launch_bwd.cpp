// From checked arguments to the backward's launches.
#include <algorithm>
#include <limits>
#include <span>

#include "base/cuda_driver/device.h"
#include "sm80/bwd_params.h"
#include "sm80/kernel_list.h"
#include "sm80/launch.h"
#include "sm80/sm80_backend.h"
#include "warp/launch_plan.h"
#include "warp/packed_tiles.h"
#include "warp/smem_tile.h"

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

// How a call is cut into blocks, and what CTAs leave in the workspace for each other.
struct Cut {
  bool is_packed;
  int64_t key_blocks;      // of a head, of all sequences if packed
  int64_t heads_k, heads;  // of all sequences if dense
  int64_t q_blocks;        // as key_blocks

  int64_t blocks() const { return heads * q_blocks; }
};

Cut cut(const Flash_bwd_params& p, const BwdTile& tile) {
  Cut c{};
  c.is_packed = p.cu_seqlens_q != nullptr;
  const int64_t batch = c.is_packed ? 1 : p.b;
  c.heads_k = batch * p.h_k;
  c.heads = batch * p.h;
  c.key_blocks =
      c.is_packed ? packed_tiles(p.total_k, p.b, tile.n) : (p.seqlen_k + tile.n - 1) / tile.n;
  c.q_blocks = c.is_packed ? p.total_q / tile.m + p.b : (p.seqlen_q + tile.m - 1) / tile.m;
  const auto largest = std::numeric_limits<int>::max();
  require(c.key_blocks * c.heads_k <= largest && c.blocks() <= largest,
          "batch_size * num_heads * seqlen is too large");
  return c;
}

// Whether several key blocks can add to a block's dQ.
bool shares_dq(const Flash_bwd_params& p, const BwdTile& tile) { return p.seqlen_k > tile.n; }

// The workspace: references, a multiple of 16 bytes; sums; turns.
size_t reference_bytes(const Flash_bwd_params& p) {
  const int64_t rows = p.cu_seqlens_q != nullptr ? p.total_q : p.b * p.seqlen_q;
  return static_cast<size_t>((rows * p.h + 1) / 2 * 2) * sizeof(RowReference);
}
size_t sum_bytes(const Cut& c, const BwdTile& tile) {
  return static_cast<size_t>(c.blocks()) * static_cast<size_t>(tile.m * tile.head_dim) *
         sizeof(float);
}
size_t turn_count(const Cut& c, const BwdTile& tile) {
  return static_cast<size_t>(c.blocks()) * static_cast<size_t>(tile.warps);
}

bool is_aligned_to_pairs(const Operand& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.ptr) % (2 * kElementBytes) == 0;
  for (const int64_t stride : {x.batch_stride, x.row_stride, x.head_stride})
    aligned &= stride % 2 == 0;
  return aligned;
}

BwdReferences references(const Flash_bwd_params& p) {
  auto* first = static_cast<RowReference*>(p.workspace.ptr);
  if (p.cu_seqlens_q != nullptr) return {first, 0, p.total_q};
  return {first, p.h * p.seqlen_q, p.seqlen_q};
}

BwdScale scale_of(const Flash_bwd_params& p) {
  const float scale = modifies_scores(p) ? 1.f : p.scale_softmax;
  return {modifies_scores(p), scale, scale * kLog2e};
}

BwdLaunch plan(const Flash_bwd_params& p, const Cut& c, const BwdTile& tile) {
  BwdLaunch launch{};
  static_cast<BwdScale&>(launch) = scale_of(p);
  launch.scheduler = {static_cast<int>(c.key_blocks), static_cast<int>(c.heads_k),
                      static_cast<int>(c.heads_k)};
  launch.heads_k = static_cast<int>(p.h_k);
  launch.group = static_cast<int>(p.h / p.h_k);
  launch.q_aligned = is_aligned(p.q, p.d);
  launch.k_aligned = is_aligned(p.k, p.d);
  launch.v_aligned = is_aligned(p.v, p.d_v);
  launch.dout_aligned = is_aligned(p.dout, p.d_v);
  launch.dk_aligned = is_aligned(p.dk, p.d);
  launch.dv_aligned = is_aligned(p.dv, p.d_v);
  launch.dq_aligned = is_aligned_to_pairs(p.dq);
  launch.bounds = index_bounds(p);
  launch.dropout = Dropout::make(p.p_dropout, p.seed, p.offset);
  launch.references = references(p);
  launch.q_blocks = static_cast<int>(c.q_blocks);
  if (!shares_dq(p, tile)) return launch;
  char* sums = static_cast<char*>(p.workspace.ptr) + reference_bytes(p);
  launch.dq_sums = reinterpret_cast<float*>(sums);
  launch.turns = reinterpret_cast<uint32_t*>(sums + sum_bytes(c, tile));
  return launch;
}

// The rows of softmax_d that belong to no query become 0.
void clear_softmax_d(const Flash_bwd_params& p) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  const int64_t rows = is_packed ? p.total_q + 128 * p.b : (p.seqlen_q + 127) / 128 * 128;
  if (!is_packed && rows == p.seqlen_q) return;
  const int64_t batches = is_packed ? 1 : p.b;
  const auto clear = [&](float* first, int64_t count) {
    if (count > 0)
      p.target.device->clear(reinterpret_cast<uint32_t*>(first), static_cast<size_t>(count),
                             p.target.stream);
  };
  if (p.dsoftmax_head_stride == rows && (batches == 1 || p.dsoftmax_batch_stride == p.h * rows))
    return clear(p.dsoftmax_sum, batches * p.h * rows);
  for (int64_t batch = 0; batch < batches; ++batch)
    for (int64_t head = 0; head < p.h; ++head)
      clear(p.dsoftmax_sum + batch * p.dsoftmax_batch_stride + head * p.dsoftmax_head_stride, rows);
}

void prepare(const Flash_bwd_params& p, BwdParams& params) {
  clear_softmax_d(p);
  const bool is_packed = p.cu_seqlens_q != nullptr;
  const int64_t tiles = is_packed ? packed_tiles(p.total_q, p.b, kPrepareRows)
                                  : (p.seqlen_q + kPrepareRows - 1) / kPrepareRows;
  const int64_t heads = is_packed ? p.h : p.b * p.h;
  BwdPrepareLaunch launch{};
  static_cast<BwdScale&>(launch) = scale_of(p);
  launch.tiles = static_cast<int>(tiles);
  launch.group = static_cast<int>(p.h / p.h_k);
  launch.q_aligned = is_aligned(p.q, p.d);
  launch.k_aligned = is_aligned(p.k, p.d);
  launch.o_aligned = is_aligned(p.o, p.d_v);
  launch.dout_aligned = is_aligned(p.dout, p.d_v);
  launch.bounds = index_bounds(p);
  launch.references = references(p);
  void* args[] = {&params, &launch};
  if (tiles * heads > 0)
    launch_rows(kernel_of(kBwdPrepareKernels, p.dtype), tiles * heads * RowConfig::threads(),
                p.target, args);
  if (p.ds_aux != nullptr)
    launch_rows(kernel_of(kSinkGradientKernels, Dtype::kFloat32), p.h * RowConfig::threads(),
                p.target, args);
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
  BwdLaunch launch_plan = plan(p, cut(p, tile), tile);
  if (ctas > 0) launch(kernel, ctas, params, launch_plan, p.target);
}

}  // namespace

size_t mha_bwd_workspace_bytes(const Flash_bwd_params& p) {
  if (p.b == 0) return 0;
  const BwdTile& tile = choose(kBwdKernels, p).tile;
  if (!shares_dq(p, tile)) return reference_bytes(p);
  const Cut c = cut(p, tile);
  return reference_bytes(p) + sum_bytes(c, tile) + turn_count(c, tile) * sizeof(uint32_t);
}

void mha_bwd(const Flash_bwd_params& p) {
  BwdParams params{p, p, p, p};
  prepare(p, params);
  if (p.dbias.ptr != nullptr) store_bias_gradient(p, params);
  const BwdKernel& kernel = choose(kBwdKernels, p);
  const Cut c = cut(p, kernel.tile);
  if (c.key_blocks * c.heads_k == 0) return;
  BwdLaunch launch_plan = plan(p, c, kernel.tile);
  if (launch_plan.turns != nullptr)
    p.target.device->clear(launch_plan.turns, turn_count(c, kernel.tile), p.target.stream);
  launch(kernel, launch_plan.scheduler.tiles(), params, launch_plan, p.target);
}

}  // namespace flash::sm80
