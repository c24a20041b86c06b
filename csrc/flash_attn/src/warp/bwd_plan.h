// What the plans of the backward share, on the host.
#pragma once

#include <cstdint>
#include <limits>

#include "base/error.h"
#include "base/row_config.h"
#include "common/bounded_sequence.h"
#include "warp/bwd_params.h"
#include "warp/launch_plan.h"
#include "warp/packed_tiles.h"
#include "warp/smem_tile.h"

namespace flash {

// Blocks of a kernel: m queries, n keys; dQ's sums are of head_dim columns, in `parts` that are
// summed apart.
struct BwdBlocks {
  int m, n, head_dim, parts;
};

// How a call is cut into blocks, and what CTAs leave in the workspace for each other.
struct BwdCut {
  bool is_packed;
  int64_t key_blocks;      // of a head, of all sequences if packed
  int64_t heads_k, heads;  // of all sequences if dense
  int64_t q_blocks;        // as key_blocks

  int64_t blocks() const { return heads * q_blocks; }
};

inline BwdCut cut(const Flash_bwd_params& p, const BwdBlocks& tile) {
  BwdCut c{};
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
inline bool shares_dq(const Flash_bwd_params& p, const BwdBlocks& tile) {
  return p.seqlen_k > tile.n;
}

// The workspace: references, a multiple of 16 bytes; sums; turns.
inline size_t reference_bytes(const Flash_bwd_params& p) {
  const int64_t rows = p.cu_seqlens_q != nullptr ? p.total_q : p.b * p.seqlen_q;
  return static_cast<size_t>((rows * p.h + 1) / 2 * 2) * sizeof(RowReference);
}
inline size_t sum_bytes(const BwdCut& c, const BwdBlocks& tile) {
  return static_cast<size_t>(c.blocks()) * static_cast<size_t>(tile.m * tile.head_dim) *
         sizeof(float);
}
inline size_t turn_count(const BwdCut& c, const BwdBlocks& tile) {
  return static_cast<size_t>(c.blocks()) * static_cast<size_t>(tile.parts);
}

// Bytes of workspace of a call.
inline size_t bwd_workspace_bytes(const Flash_bwd_params& p, const BwdBlocks& tile) {
  if (!shares_dq(p, tile)) return reference_bytes(p);
  const BwdCut c = cut(p, tile);
  return reference_bytes(p) + sum_bytes(c, tile) + turn_count(c, tile) * sizeof(uint32_t);
}

// Whether rows start at multiples of 4 bytes.
inline bool is_aligned_to_pairs(const Operand& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.ptr) % (2 * kElementBytes) == 0;
  for (const int64_t stride : {x.batch_stride, x.row_stride, x.head_stride})
    aligned &= stride % 2 == 0;
  return aligned;
}

inline BwdReferences references(const Flash_bwd_params& p) {
  auto* first = static_cast<RowReference*>(p.workspace.ptr);
  if (p.cu_seqlens_q != nullptr) return {first, 0, p.total_q};
  return {first, p.h * p.seqlen_q, p.seqlen_q};
}

inline BwdScale scale_of(const Flash_bwd_params& p) {
  const float scale = modifies_scores(p) ? 1.f : p.scale_softmax;
  return {modifies_scores(p), scale, scale * kLog2e};
}

// The tiles of the main kernel; nobody has had a turn yet.
inline BwdTiles plan_bwd_tiles(const Flash_bwd_params& p, const BwdCut& c, const BwdBlocks& tile,
                               const IndexBounds& bounds) {
  BwdTiles tiles{};
  tiles.scheduler = {static_cast<int>(c.key_blocks), static_cast<int>(c.heads_k),
                     static_cast<int>(c.heads_k)};
  tiles.heads_k = static_cast<int>(p.h_k);
  tiles.group = static_cast<int>(p.h / p.h_k);
  tiles.bounds = bounds;
  tiles.references = references(p);
  tiles.q_blocks = static_cast<int>(c.q_blocks);
  if (!shares_dq(p, tile)) return tiles;
  char* sums = static_cast<char*>(p.workspace.ptr) + reference_bytes(p);
  tiles.dq_sums = reinterpret_cast<float*>(sums);
  tiles.turns = reinterpret_cast<uint32_t*>(sums + sum_bytes(c, tile));
  return tiles;
}

// Calls clear(words, count) for the rows of softmax_d that belong to no query, which become 0.
template <class Clear>
void clear_softmax_d(const Flash_bwd_params& p, const Clear& clear_words) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  const int64_t rows = is_packed ? p.total_q + 128 * p.b : (p.seqlen_q + 127) / 128 * 128;
  if (!is_packed && rows == p.seqlen_q) return;
  const int64_t batches = is_packed ? 1 : p.b;
  const auto clear = [&](float* first, int64_t count) {
    if (count > 0) clear_words(reinterpret_cast<uint32_t*>(first), static_cast<size_t>(count));
  };
  if (p.dsoftmax_head_stride == rows && (batches == 1 || p.dsoftmax_batch_stride == p.h * rows))
    return clear(p.dsoftmax_sum, batches * p.h * rows);
  for (int64_t batch = 0; batch < batches; ++batch)
    for (int64_t head = 0; head < p.h; ++head)
      clear(p.dsoftmax_sum + batch * p.dsoftmax_batch_stride + head * p.dsoftmax_head_stride, rows);
}

inline BwdPrepareLaunch plan_prepare(const Flash_bwd_params& p, const IndexBounds& bounds) {
  const bool is_packed = p.cu_seqlens_q != nullptr;
  const int64_t tiles = is_packed ? packed_tiles(p.total_q, p.b, kPrepareRows)
                                  : (p.seqlen_q + kPrepareRows - 1) / kPrepareRows;
  BwdPrepareLaunch launch{};
  static_cast<BwdScale&>(launch) = scale_of(p);
  launch.tiles = static_cast<int>(tiles);
  launch.group = static_cast<int>(p.h / p.h_k);
  launch.q_aligned = is_aligned(p.q, p.d);
  launch.k_aligned = is_aligned(p.k, p.d);
  launch.o_aligned = is_aligned(p.o, p.d_v);
  launch.dout_aligned = is_aligned(p.dout, p.d_v);
  launch.bounds = bounds;
  launch.references = references(p);
  return launch;
}

// What comes before the main kernel: clear_softmax_d, and launch(threads, args) of the preparation.
template <class Clear, class Launch>
void prepare_bwd(const Flash_bwd_params& p, BwdParams& params, const IndexBounds& bounds,
                 const Clear& clear_words, const Launch& launch_rows) {
  clear_softmax_d(p, clear_words);
  const int64_t heads = p.cu_seqlens_q != nullptr ? p.h : p.b * p.h;
  BwdPrepareLaunch launch = plan_prepare(p, bounds);
  void* args[] = {&params, &launch};
  if (launch.tiles * heads > 0) launch_rows(launch.tiles * heads * RowConfig::threads(), args);
}

}  // namespace flash
