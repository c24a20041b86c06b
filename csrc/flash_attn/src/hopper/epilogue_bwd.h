// From a warpgroup's accumulators to dq, dk and dv.
#pragma once

#include "base/ptx/atomic.h"
#include "base/ptx/fragments.h"
#include "base/ptx/math.h"
#include "base/ptx/special_registers.h"
#include "base/static_for.h"
#include "hopper/bwd_params.h"
#include "hopper/bwd_smem.h"
#include "hopper/load_bwd.h"
#include "hopper/named_barrier.h"
#include "warp/store_gradients.h"
#include "warp/store_rows.h"

namespace flash::hopper {

// Completes a round of a block's dQ, tiles kFirst.. of `r`, whose other visitors have added theirs
// or will: waits for them, and writes dq.
template <BwdConfig C, int kFirst, int kTiles, int kN>
FLASH_DEVICE void finish_dq(const float (&r)[1][kN][4], const BwdParams& p, const BwdLaunch& launch,
                            const KeyTile& here, const BwdVisit& visit, int warpgroup, int round) {
  const int lane = ptx::read_tid_x() % 32, warp = ptx::read_tid_x() / 32 % 4;
  float rdQ[kTiles][4];
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) rdQ[n][i] = r[0][kFirst + n][i];
  if (visit.turn.before > 0) {
    const DqSums<C> from(launch, here, visit.queries, warpgroup);
    if (lane == 0) from.wait(visit.turn);
    __syncwarp();
    const float4* sums =
        reinterpret_cast<const float4*>(from.sums) + (round * 4 + warp) * kTiles * 32 + lane;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n % 4 == 0) ptx::keep_loads_behind();  // registers are short
      const float4 x = sums[n * 32];
      rdQ[n][0] += x.x;
      rdQ[n][1] += x.y;
      rdQ[n][2] += x.z;
      rdQ[n][3] += x.w;
    }
  }
  const DqPart part = dq_part<C>(warpgroup);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
    const int row = visit.queries.block * C.m() + part.row + warp * 16 + first.row;
    if (row >= here.seq.seqlen_q) continue;
    char* dq = operand_row(p.dq, C.dtype, here.seq.batch, here.seq.q_row + row, visit.queries.head);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = part.column + round * kStagedColumns + n * 8 + first.col;
      const float* x = &rdQ[n][2 * half];
      store_pair(dq + column * kElementBytes,
                 ptx::pack<C.dtype>(x[0] * p.scale_softmax, x[1] * p.scale_softmax),
                 static_cast<int>(p.d) - column, launch.dq_aligned);
    }
  }
}

// What a warpgroup has of dK and dV: the first key, of the CTA's, and the first column.
struct KeyPart {
  int key, column;
};

// Writes a warpgroup's part of dK or dV, 64 keys, times `scale`, through its own part of a tile.
template <BwdConfig C, int kColumns>
FLASH_DEVICE void store_key_gradient(char* tile, const float (&r)[1][kColumns / 8][4], float scale,
                                     const Operand& x, bool aligned, int64_t head_dim,
                                     const KeyTile& here, const KeyPart& part, int warpgroup) {
  using K = typename BwdSmemPlan<C>::K;
  using Part = SmemTile<kColumns, C.n()>;
  static_assert(Part::kGroupBytes == K::kGroupBytes);
  const uint32_t rows = ptx::shared_address(tile) + part.key * K::kRowBytes +
                        part.column / K::kGroupCols * K::kGroupBytes;
  const ptx::Chunk chunk = ptx::a_chunk(ptx::read_tid_x() % 32);
  const uint32_t lane = rows + K::offset(ptx::read_tid_x() / 32 % 4 * 16 + chunk.row, chunk.chunk);
  static_for<kColumns / 16>([&](auto pair) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&from)[4] = r[0][2 * pair + i / 2];
      packed[i] = ptx::pack<C.dtype>(from[i % 2 * 2] * scale, from[i % 2 * 2 + 1] * scale);
    }
    ptx::stmatrix_x4<K::ahead(pair)>(lane ^ K::flip(pair), packed);
  });
  warpgroup_barrier(warpgroup);
  char* to = operand_row(x, C.dtype, here.seq.k_batch, here.seq.k_row + here.first_key + part.key,
                         here.head_k) +
             part.column * kElementBytes;
  store_rows<Part, kWarpgroupThreads>(
      rows, to, x.row_stride * kElementBytes, aligned, min(kWarpgroupRows, here.keys - part.key),
      static_cast<int>(head_dim) - part.column, ptx::read_tid_x() % kWarpgroupThreads);
}

// Writes dK and dV, through shared memory where K and V were, which nobody reads any more.
template <BwdConfig C, int kColumns>
FLASH_DEVICE void store_key_gradients(const BwdParams& p, const BwdLaunch& launch,
                                      BwdSmemPlan<C>& smem, const float (&rdK)[1][kColumns / 8][4],
                                      const float (&rdV)[1][kColumns / 8][4], const KeyPart& part,
                                      int warpgroup) {
  const KeyTile& here = smem.tile;
  store_key_gradient<C, kColumns>(smem.k, rdK, p.scale_softmax, p.dk, launch.dk_aligned, p.d, here,
                                  part, warpgroup);
  store_key_gradient<C, kColumns>(smem.v, rdV, 1.f, p.dv, launch.dv_aligned, p.d_v, here, part,
                                  warpgroup);
}

}  // namespace flash::hopper
