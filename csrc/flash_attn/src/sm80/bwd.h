// Attention, backward, for compute capability 8.0 and newer: cp.async, ldmatrix, mma.sync.
//
// FlashAttention-2 (arXiv:2307.08691), algorithm 2. With P = exp(scale S - lse) recomputed and
// delta = rowsum(dO * O) - dlse, which bwd_prepare.h has left in softmax_d:
//
//   S = Q K^T, dP = dO V^T, dS = P * (dP - delta)
//   dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K
//
// A CTA owns n keys of one key-value head (bwd_table.h) and walks over the blocks of m queries that
// see any of them, for all query heads of its group, one after the other: dK and dV of the keys
// stay in registers and have one owner. Scores are computed once; P and dS pass through shared
// memory as 16 bits, since the three products after them are shared out otherwise among the warps:
// every operand of a product is read by ldmatrix, and a warp's tile is the largest that registers
// allow.
//
// dQ of a block of queries is summed over the CTAs whose keys it sees, in fp32 and in a fixed order
// (common/bwd_schedule.h): a warp waits until the others before it have added, adds, and tells the
// next; the last writes dq. The result depends on no schedule. A warp's sums lie in memory as its
// lanes hold them.
//
// Memory traffic of a CTA: K, V, dK and dV once, Q and dO of a block at each visit, and its dQ's
// sums there and back.
#pragma once

#include "base/ptx/atomic.h"
#include "common/block_range.h"
#include "common/bounded_sequence.h"
#include "common/bwd_schedule.h"
#include "sm80/bwd_params.h"
#include "sm80/bwd_smem.h"
#include "sm80/epilogue.h"
#include "sm80/load.h"
#include "sm80/packed_tile.h"
#include "sm80/report.h"
#include "sm80/score.h"
#include "sm80/tile_gemm.h"

namespace flash::sm80 {

// Query blocks of the sequences of a packed batch before `batch`, counted by a warp.
template <int kM>
FLASH_DEVICE int query_blocks_before(const SequenceGeometry& p, int batch) {
  int blocks = 0;
  for (int i = ptx::read_tid_x() % 32; i < batch; i += 32)
    if (query_faults(p, i) == 0) blocks += (length_of(p.cu_seqlens_q, i) + kM - 1) / kM;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) blocks += __shfl_xor_sync(0xffffffffu, blocks, step);
  return blocks;
}

// This CTA's number among the key blocks of a head and the heads.
struct BwdNumber {
  int key_block, batch_head;  // key_block: of a packed batch, over all sequences

  FLASH_DEVICE explicit BwdNumber(const BwdLaunch& launch) {
    const int cta = ptx::read_ctaid_x();
    const Tile_coordinates group = launch.scheduler.tile(cta / launch.blocks_of_group);
    key_block = (launch.scheduler.m_blocks - 1 - group.m_block) * launch.blocks_of_group +
                cta % launch.blocks_of_group;
    batch_head = group.batch_head;
  }
};

// Puts this CTA's block of keys into shared memory.
template <BwdConfig C>
FLASH_DEVICE void find_tile(BwdCtaTile& tile, const BwdParams& p, const BwdLaunch& launch) {
  if (ptx::read_tid_x() < 32) {
    constexpr int kM = C.tile().m;
    const BwdNumber number(launch);
    const bool is_packed = p.cu_seqlens_q != nullptr;
    PackedTile found{number.batch_head / launch.heads_k, number.key_block, 0};
    if (is_packed)
      found = packed_tile<C.tile().n>(p.cu_seqlens_k, p.seqlen_k, static_cast<int>(p.b),
                                      number.key_block, launch.scheduler.m_blocks);
    const int q_blocks = is_packed ? query_blocks_before<kM>(p, found.batch)
                                   : found.batch * static_cast<int>(p.h) * launch.q_blocks;
    if (ptx::read_tid_x() == 0) {
      IndexFaults faults = 0;
      tile.place = found;
      tile.sequence = found.batch < p.b
                          ? bounded_sequence(p, found.batch, launch.bounds.max_cached, faults)
                          : Sequence{};
      tile.first_q_block = q_blocks;
      // Sequences that overlap may have more blocks than there is room for.
      if (is_packed && q_blocks + (tile.sequence.seqlen_q + kM - 1) / kM > launch.q_blocks)
        tile.sequence.seqlen_q = 0;
      if (faults != 0) report(launch.bounds, faults);
    }
  }
  __syncthreads();
}

// Where this CTA and this warp are.
template <BwdConfig C>
struct BwdPlace {
  int batch, head_k, key_block;
  Sequence seq;
  BwdSchedule schedule;
  QueryBlocks visits;
  int warp, lane;

  FLASH_DEVICE BwdPlace(const BwdParams& p, const BwdLaunch& launch, const BwdCtaTile& tile)
      : batch(tile.place.batch), key_block(tile.place.m_block), seq(tile.sequence) {
    const int thread = ptx::read_tid_x();
    head_k = BwdNumber(launch).batch_head % launch.heads_k;
    schedule = {mask_of(p, seq), C.tile().m, C.tile().n, launch.blocks_of_group};
    visits = schedule.visits(key_block);
    warp = __shfl_sync(0xffffffffu, thread / 32, 0);  // which tells the compiler that it is uniform
    lane = thread % 32;
  }
  FLASH_DEVICE int first_key() const { return key_block * C.tile().n; }
  FLASH_DEVICE int keys() const { return min(C.tile().n, seq.seqlen_k - first_key()); }
};

// A visit: a block of queries of one head.
struct Visit {
  int head, step;  // head: of the group

  FLASH_DEVICE bool exists(int heads) const { return head < heads; }
  FLASH_DEVICE Visit next(int steps) const {
    return step + 1 < steps ? Visit{head, step + 1} : Visit{head + 1, 0};
  }
};

// What the warps of a CTA share out for dV and dK (n keys x head dim), and for dQ (m queries x head
// dim): every so many-th block of 16 rows and columns.
template <BwdConfig C>
struct BwdWarps {
  static constexpr BwdTile kTile = C.tile();
  static constexpr int kKeyWarps = kTile.kv_key_warps, kKvColumnWarps = kTile.warps / kKeyWarps;
  static constexpr int kQueryWarps = kTile.q_query_warps, kQColumnWarps = kTile.warps / kQueryWarps;
  using KeyGradient = Accumulators<kTile.n / kKeyWarps / 16, C.head_dim / kKvColumnWarps / 8>;
  using QueryGradient = Accumulators<kTile.m / kQueryWarps / 16, C.head_dim / kQColumnWarps / 8>;
};

// Fetches a visit's Q, dO, lse and delta.
template <BwdConfig C>
FLASH_DEVICE void fetch(uint32_t stage, const BwdParams& p, const BwdLaunch& launch,
                        const BwdPlace<C>& here, const Visit& visit) {
  using Plan = BwdSmemPlan<C>;
  using Stage = typename Plan::Stage;
  constexpr int kM = C.tile().m;
  using Loader = TileLoader<typename Plan::Q, kM, C.threads()>;
  const int head = here.head_k * launch.group + visit.head;
  const int row = here.visits.at(visit.step) * kM;
  const Loader q(operand_row(p.q, C.dtype, here.batch, here.seq.q_row, head), here.seq.seqlen_q,
                 static_cast<int>(p.d));
  q.copy(stage + offsetof(Stage, q), row, p.q.row_stride * kElementBytes, launch.q_aligned);
  const Loader dout(operand_row(p.dout, C.dtype, here.batch, here.seq.q_row, head),
                    here.seq.seqlen_q, static_cast<int>(p.d_v));
  dout.copy(stage + offsetof(Stage, dout), row, p.dout.row_stride * kElementBytes,
            launch.dout_aligned);
  const int i = ptx::read_tid_x();
  if (i < kM) {
    const bool exists = row + i < here.seq.seqlen_q;
    const float* lse = p.softmax_lse + here.batch * p.lse_batch_stride + head * p.lse_head_stride +
                       here.seq.lse_row;
    ptx::cp_async_4_bytes(stage + offsetof(Stage, lse) + 4 * i, lse + row + i, exists);
    const int64_t first = p.cu_seqlens_q == nullptr ? 0 : here.seq.lse_row + 128 * here.batch;
    const float* delta = p.dsoftmax_sum + here.batch * p.dsoftmax_batch_stride +
                         head * p.dsoftmax_head_stride + first;
    ptx::cp_async_4_bytes(stage + offsetof(Stage, delta) + 4 * i, delta + row + i, exists);
  }
}

// Fetches K and V.
template <BwdConfig C>
FLASH_DEVICE void fetch_keys(uint32_t smem, const BwdParams& p, const BwdLaunch& launch,
                             const BwdPlace<C>& here) {
  using Plan = BwdSmemPlan<C>;
  using Loader = TileLoader<typename Plan::K, C.tile().n, C.threads()>;
  const auto copy = [&](int to, const Operand& x, int64_t head_dim, bool aligned) {
    const Loader loader(operand_row(x, C.dtype, here.seq.k_batch, here.seq.k_row, here.head_k),
                        here.seq.seqlen_k, static_cast<int>(head_dim));
    loader.copy(smem + to, here.first_key(), x.row_stride * kElementBytes, aligned);
  };
  copy(offsetof(Plan, k), p.k, p.d, launch.k_aligned);
  copy(offsetof(Plan, v), p.v, p.d_v, launch.v_aligned);
}

// A warp's part of the scores of a visit.
template <BwdConfig C>
struct ScoreTile {
  static constexpr int kKeyWarps = C.tile().s_key_warps;
  int row, key;  // first ones, of the tile

  FLASH_DEVICE explicit ScoreTile(int warp)
      : row(warp / kKeyWarps * C.warp_rows()), key(warp % kKeyWarps * C.warp_keys()) {}
};

// Writes a warp's scores, packed, to a tile of shared memory.
template <BwdConfig C>
FLASH_DEVICE void store_scores(uint32_t tile, const typename WarpTile<C>::Probabilities& r,
                               const ScoreTile<C>& part, int lane) {
  using W = WarpTile<C>;
  using P = typename BwdSmemPlan<C>::P;
  static_for<W::kM>([&](auto m) {
    static_for<2>([&](auto half) {
      const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
      const int row = part.row + m * 16 + first.row;
#pragma unroll
      for (int n = 0; n < W::kS; ++n)
        ptx::store_shared(
            tile + P::offset(row, part.key / kChunkElements + n) + first.col * kElementBytes,
            r[m][n][half]);
    });
  });
}

// The first row of lse or delta that each of a lane's score rows needs.
template <BwdConfig C>
using RowValues = float[WarpTile<C>::kM][2];

template <BwdConfig C>
FLASH_DEVICE void load_rows(RowValues<C>& r, uint32_t values, const ScoreTile<C>& part, int lane) {
#pragma unroll
  for (int m = 0; m < WarpTile<C>::kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      r[m][half] =
          __uint_as_float(ptx::load_shared(values + 4 * (part.row + m * 16 + half * 8 + lane / 4)));
}

// rdP = dP - delta, with what dropout and the softcap do to it; rS become natural logits where they
// are modified.
template <BwdConfig C>
FLASH_DEVICE void modify(typename WarpTile<C>::Scores& rS, typename WarpTile<C>::Scores& rdP,
                         const RowValues<C>& delta, const Kept<C>& kept, const BwdParams& p,
                         const BwdLaunch& launch, const ScorePlace& place, int first_key) {
  using W = WarpTile<C>;
#pragma unroll
  for (int m = 0; m < W::kM; ++m)
#pragma unroll
    for (int n = 0; n < W::kS; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = rdP[m][n][i];
        if (launch.dropout.enabled)
          x = kept[m][n] >> (8 * i + 7) & 1u ? x * launch.dropout.rescale : 0.f;
        x -= delta[m][i / 2];
      }
  if (!launch.modifies_scores) return;
  modify_scores<C>(rS, p, place, first_key, [&](const auto& capped) {
    const float inverse = 1.f / p.softcap;
#pragma unroll
    for (int m = 0; m < W::kM; ++m)
#pragma unroll
      for (int n = 0; n < W::kS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float t = capped[m][n][i] * inverse;
          rdP[m][n][i] *= fmaf(-t, t, 1.f);
        }
  });
}

// rP = exp of the logits - lse, rdS = rP (dP - delta); both 0 where the key is hidden. `seen(m,
// half)`: the keys that a row sees, from this lane's first on.
template <BwdConfig C, class Seen>
FLASH_DEVICE void softmax_bwd_step(typename WarpTile<C>::Probabilities& rP,
                                   typename WarpTile<C>::Probabilities& rdS,
                                   const typename WarpTile<C>::Scores& rS,
                                   const typename WarpTile<C>::Scores& rdP, const RowValues<C>& lse,
                                   float scale_log2, const Seen& seen) {
  using W = WarpTile<C>;
#pragma unroll
  for (int m = 0; m < W::kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto sees = seen(m, half);
      const float reference = -lse[m][half] * kLog2e;
#pragma unroll
      for (int n = 0; n < W::kS; ++n) {
        float weight[2], slope[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float x = ptx::ex2(fmaf(rS[m][n][2 * half + i], scale_log2, reference));
          weight[i] = sees(n * 8 + i) ? x : 0.f;
          slope[i] = sees(n * 8 + i) ? x * rdP[m][n][2 * half + i] : 0.f;
        }
        rP[m][n][half] = ptx::pack<C.dtype>(weight[0], weight[1]);
        rdS[m][n][half] = ptx::pack<C.dtype>(slope[0], slope[1]);
      }
    }
  }
}

// S and dP of a visit, and of them P and dS, in shared memory.
template <BwdConfig C>
FLASH_DEVICE void recompute(uint32_t smem, uint32_t stage, const BwdParams& p,
                            const BwdLaunch& launch, const BwdPlace<C>& here, const Visit& visit) {
  using W = WarpTile<C>;
  using Plan = BwdSmemPlan<C>;
  using Stage = typename Plan::Stage;
  constexpr BwdTile kTile = C.tile();
  const ScoreTile<C> part(here.warp);
  const int head = here.head_k * launch.group + visit.head;
  const int first_row = here.visits.at(visit.step) * kTile.m + part.row;
  const int first_key = here.first_key() + part.key;

  const ptx::Chunk a = ptx::a_chunk(here.lane), b = ptx::b_chunk_n_major(here.lane);
  const uint32_t rows = Plan::Q::offset(part.row + a.row, a.chunk);
  const uint32_t keys = Plan::K::offset(part.key + b.row, b.chunk);
  const auto product = [&](typename W::Scores& r, uint32_t of_rows, uint32_t of_keys) {
    clear(r);
    gemm<C.dtype, C.head_dim / 16>(r, SumAlongRows<typename Plan::Q>{of_rows + rows},
                                   SumAlongRows<typename Plan::K>{of_keys + keys});
  };
  typename W::Scores rS, rdP;
  product(rS, stage + offsetof(Stage, q), smem + offsetof(Plan, k));
  product(rdP, stage + offsetof(Stage, dout), smem + offsetof(Plan, v));

  RowValues<C> lse, delta;
  load_rows<C>(lse, stage + offsetof(Stage, lse), part, here.lane);
  load_rows<C>(delta, stage + offsetof(Stage, delta), part, here.lane);
  Kept<C> kept{};
  if constexpr (C.scores == ScoreClass::kModified) {
    if (launch.dropout.enabled)
      draw<C>(kept, launch.dropout, static_cast<uint32_t>(here.batch * p.h + head), first_row,
              first_key);
    modify<C>(rS, rdP, delta, kept, p, launch, {here.batch, head, first_row, here.schedule.mask},
              first_key);
  } else {
#pragma unroll
    for (int m = 0; m < W::kM; ++m)
#pragma unroll
      for (int n = 0; n < W::kS; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) rdP[m][n][i] -= delta[m][i / 2];
  }

  typename W::Probabilities rP, rdS;
  const Mask& mask = here.schedule.mask;
  const BlockRange blocks = here.schedule.key_blocks(here.visits.at(visit.step));
  const bool is_full = blocks.is_full(here.key_block) && first_row + C.warp_rows() <= mask.seqlen_q;
  if (is_full) {
    softmax_bwd_step<C>(rP, rdS, rS, rdP, lse, launch.scale_log2,
                        [](int, int) { return [](int) { return true; }; });
  } else {
    const ptx::Element first = ptx::accumulator_element(here.lane, 0);
    softmax_bwd_step<C>(rP, rdS, rS, rdP, lse, launch.scale_log2, [&](int m, int half) {
      const int row = first_row + m * 16 + half * 8 + first.row;
      KeyRange range = mask.keys(row);
      if (row >= mask.seqlen_q) range.end = range.begin;
      const int begin = range.begin - first_key - first.col;
      const int end = range.end - first_key - first.col;
      return [=](int key) { return begin <= key && key < end; };
    });
  }
  if constexpr (C.scores == ScoreClass::kModified) {
    if (launch.dropout.enabled) drop<C>(rP, kept);
  }
  store_scores<C>(smem + offsetof(Plan, p), rP, part, here.lane);
  store_scores<C>(smem + offsetof(Plan, ds), rdS, part, here.lane);
}

// r += A^T B: gradients of keys, of P or dS and dO or Q.
template <BwdConfig C>
FLASH_DEVICE void gemm_of_keys(typename BwdWarps<C>::KeyGradient& r, uint32_t scores,
                               uint32_t queries, int warp, int lane) {
  using Plan = BwdSmemPlan<C>;
  using Warps = BwdWarps<C>;
  const ptx::Chunk a = ptx::a_chunk_k_major(lane), b = ptx::b_chunk_k_major(lane);
  const int keys = warp % Warps::kKeyWarps, columns = warp / Warps::kKeyWarps;
  gemm<C.dtype, C.tile().m / 16>(r,
                                 SumDownColumns<typename Plan::P, Warps::kKeyWarps>{
                                     scores + Plan::P::offset(a.row, 2 * keys + a.chunk)},
                                 SumDownColumns<typename Plan::Q, Warps::kKvColumnWarps>{
                                     queries + Plan::Q::offset(b.row, 2 * columns + b.chunk)});
}

// rdQ = dS K.
template <BwdConfig C>
FLASH_DEVICE void gemm_of_queries(typename BwdWarps<C>::QueryGradient& r, uint32_t scores,
                                  uint32_t keys, int warp, int lane) {
  using Plan = BwdSmemPlan<C>;
  using Warps = BwdWarps<C>;
  const ptx::Chunk a = ptx::a_chunk(lane), b = ptx::b_chunk_k_major(lane);
  const int rows = warp % Warps::kQueryWarps, columns = warp / Warps::kQueryWarps;
  clear(r);
  gemm<C.dtype, C.tile().n / 16>(
      r,
      SumAlongRows<typename Plan::P>{
          scores + Plan::P::offset(rows * (C.tile().m / Warps::kQueryWarps) + a.row, a.chunk)},
      SumDownColumns<typename Plan::K, Warps::kQColumnWarps>{
          keys + Plan::K::offset(b.row, 2 * columns + b.chunk)});
}

// Two neighbouring elements of a row of dq, of which `columns` are left.
FLASH_DEVICE void store_pair(char* destination, uint32_t pair, int columns, bool aligned) {
  if (aligned && columns >= 2) {
    *reinterpret_cast<uint32_t*>(destination) = pair;
    return;
  }
  auto* elements = reinterpret_cast<uint16_t*>(destination);
  if (columns >= 1) elements[0] = static_cast<uint16_t>(pair);
  if (columns >= 2) elements[1] = static_cast<uint16_t>(pair >> 16);
}

template <BwdConfig C>
FLASH_DEVICE void store_dq(const typename BwdWarps<C>::QueryGradient& rdQ, const BwdParams& p,
                           const BwdLaunch& launch, const BwdPlace<C>& here, const Visit& visit) {
  using Warps = BwdWarps<C>;
  constexpr int kM = C.tile().m / Warps::kQueryWarps;
  const int head = here.head_k * launch.group + visit.head;
  const int first_row =
      here.visits.at(visit.step) * C.tile().m + here.warp % Warps::kQueryWarps * kM;
  const int first_column = here.warp / Warps::kQueryWarps * 16;
  static_for<kM / 8>([&](auto i) {
    const ptx::Element first = ptx::accumulator_element(here.lane, 2 * (i % 2));
    const int row = first_row + i / 2 * 16 + first.row;
    if (row >= here.seq.seqlen_q) return;
    char* destination = operand_row(p.dq, C.dtype, here.batch, here.seq.q_row + row, head);
#pragma unroll
    for (int n = 0; n < C.head_dim / Warps::kQColumnWarps / 8; ++n) {
      const int column = first_column + n / 2 * 16 * Warps::kQColumnWarps + n % 2 * 8 + first.col;
      const float* x = &rdQ[i / 2][n][2 * (i % 2)];
      store_pair(destination + column * kElementBytes,
                 ptx::pack<C.dtype>(x[0] * p.scale_softmax, x[1] * p.scale_softmax),
                 static_cast<int>(p.d) - column, launch.dq_aligned);
    }
  });
}

// The warp's turn at its part of a block's dQ.
template <BwdConfig C>
FLASH_DEVICE void add_dq(typename BwdWarps<C>::QueryGradient& rdQ, const BwdParams& p,
                         const BwdLaunch& launch, const BwdPlace<C>& here, const BwdCtaTile& tile,
                         const Visit& visit) {
  constexpr int kWarps = C.tile().warps;
  constexpr int kM = sizeof(rdQ) / sizeof(rdQ[0]), kN = sizeof(rdQ[0]) / sizeof(rdQ[0][0]);
  const int block = here.visits.at(visit.step);
  const int head = here.head_k * launch.group + visit.head;
  const Turn turn = here.schedule.turn(
      here.key_block, block, visit.step, [&](int first, int end, const auto& holds) {
        int count = 0;
        for (; first < end; first += 32)
          count += __popc(
              __ballot_sync(0xffffffffu, first + here.lane < end && holds(first + here.lane)));
        return count;
      });
  const int64_t index =
      (tile.first_q_block + int64_t{head} * launch.q_blocks + block) * kWarps + here.warp;
  float4* sums = reinterpret_cast<float4*>(launch.dq_sums) + index * (kM * kN * 32) + here.lane;
  if (turn.before > 0) {
    if (here.lane == 0)
      while (ptx::load_acquire(launch.turns + index) != static_cast<uint32_t>(turn.before)) {
      }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float4 x = sums[(m * kN + n) * 32];
        rdQ[m][n][0] += x.x;
        rdQ[m][n][1] += x.y;
        rdQ[m][n][2] += x.z;
        rdQ[m][n][3] += x.w;
      }
  }
  if (turn.is_last()) return store_dq<C>(rdQ, p, launch, here, visit);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
      sums[(m * kN + n) * 32] = float4{rdQ[m][n][0], rdQ[m][n][1], rdQ[m][n][2], rdQ[m][n][3]};
  __syncwarp();
  if (here.lane == 0)
    ptx::store_release(launch.turns + index, static_cast<uint32_t>(turn.before + 1));
  __syncwarp();
}

// Writes the gradient of this CTA's keys, or of values, through shared memory where they were.
template <BwdConfig C>
FLASH_DEVICE void stage_gradient(uint32_t tile, const typename BwdWarps<C>::KeyGradient& r,
                                 float scale, int warp, int lane) {
  using Warps = BwdWarps<C>;
  using K = typename BwdSmemPlan<C>::K;
  const int keys = warp % Warps::kKeyWarps, columns = warp / Warps::kKeyWarps;
  static_for<C.tile().n / Warps::kKeyWarps / 8>([&](auto i) {
    const ptx::Element first = ptx::accumulator_element(lane, 2 * (i % 2));
    const int row = (keys + i / 2 * Warps::kKeyWarps) * 16 + first.row;
#pragma unroll
    for (int n = 0; n < C.head_dim / Warps::kKvColumnWarps / 8; ++n) {
      const int chunk = 2 * (columns + n / 2 * Warps::kKvColumnWarps) + n % 2;
      const float* x = &r[i / 2][n][2 * (i % 2)];
      ptx::store_shared(tile + K::offset(row, chunk) + first.col * kElementBytes,
                        ptx::pack<C.dtype>(x[0] * scale, x[1] * scale));
    }
  });
}

template <BwdConfig C>
FLASH_DEVICE void epilogue(uint32_t smem, const typename BwdWarps<C>::KeyGradient& rdK,
                           const typename BwdWarps<C>::KeyGradient& rdV, const BwdParams& p,
                           const BwdLaunch& launch, const BwdPlace<C>& here) {
  using Plan = BwdSmemPlan<C>;
  const uint32_t sdK = smem + offsetof(Plan, k), sdV = smem + offsetof(Plan, v);
  __syncthreads();
  stage_gradient<C>(sdK, rdK, p.scale_softmax, here.warp, here.lane);
  stage_gradient<C>(sdV, rdV, C.scores == ScoreClass::kModified ? launch.dropout.rescale : 1.f,
                    here.warp, here.lane);
  __syncthreads();
  const auto store = [&](uint32_t tile, const Operand& x, bool aligned, int64_t head_dim) {
    store_rows<typename Plan::K, C.threads()>(
        tile,
        operand_row(x, C.dtype, here.seq.k_batch, here.seq.k_row + here.first_key(), here.head_k),
        x.row_stride * kElementBytes, aligned, here.keys(), static_cast<int>(head_dim),
        ptx::read_tid_x());
  };
  store(sdK, p.dk, launch.dk_aligned, p.d);
  store(sdV, p.dv, launch.dv_aligned, p.d_v);
}

// Zeros for keys of no sequence, this CTA's share of them.
template <BwdConfig C>
FLASH_DEVICE void clear_rows_of_no_sequence(const BwdParams& p, const BwdPlace<C>& here,
                                            const PackedTile& tile) {
  const int64_t first = max(p.cu_seqlens_k[p.b], 0);
  const auto clear_row = [&](const Operand& x, int64_t row, int64_t head_dim) {
    auto* elements = reinterpret_cast<uint16_t*>(operand_row(x, C.dtype, 0, row, here.head_k));
    for (int i = threadIdx.x; i < head_dim; i += C.threads()) elements[i] = 0;
  };
  for (int64_t row = first + tile.m_block; row < p.total_k; row += tile.others) {
    clear_row(p.dk, row, p.d);
    clear_row(p.dv, row, p.d_v);
  }
}

template <BwdConfig C>
FLASH_DEVICE void mha_bwd(const BwdParams& p, const BwdLaunch& launch) {
  using Plan = BwdSmemPlan<C>;
  using Stage = typename Plan::Stage;
  using Warps = BwdWarps<C>;
  constexpr int kStages = C.tile().stages;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t smem = ptx::shared_address(memory);

  BwdCtaTile& tile = reinterpret_cast<Plan*>(memory)->tile;
  find_tile<C>(tile, p, launch);
  const BwdPlace<C> here(p, launch, tile);
  if (here.batch == p.b) return clear_rows_of_no_sequence(p, here, tile.place);
  if (here.first_key() >= here.seq.seqlen_k) return;

  typename Warps::KeyGradient rdK, rdV;
  clear(rdK);
  clear(rdV);
  const int heads = here.visits.count() > 0 ? launch.group : 0;
  Visit visit{0, 0};
  uint32_t stage = smem + offsetof(Plan, stages);
  if (heads > 0) {
    fetch_keys<C>(smem, p, launch, here);
    fetch<C>(stage, p, launch, here, visit);
    ptx::cp_async_commit_group();
  }
  while (visit.exists(heads)) {
    const Visit next = visit.next(here.visits.count());
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    const uint32_t other = kStages == 1
                               ? stage
                               : 2 * (smem + static_cast<uint32_t>(offsetof(Plan, stages))) +
                                     static_cast<uint32_t>(sizeof(Stage)) - stage;
    if (kStages > 1 && next.exists(heads)) {
      fetch<C>(other, p, launch, here, next);
      ptx::cp_async_commit_group();
    }
    recompute<C>(smem, stage, p, launch, here, visit);
    __syncthreads();
    gemm_of_keys<C>(rdV, smem + offsetof(Plan, p), stage + offsetof(Stage, dout), here.warp,
                    here.lane);
    gemm_of_keys<C>(rdK, smem + offsetof(Plan, ds), stage + offsetof(Stage, q), here.warp,
                    here.lane);
    if (kStages == 1 && next.exists(heads)) {
      __syncthreads();
      fetch<C>(other, p, launch, here, next);
      ptx::cp_async_commit_group();
    }
    typename Warps::QueryGradient rdQ;
    gemm_of_queries<C>(rdQ, smem + offsetof(Plan, ds), smem + offsetof(Plan, k), here.warp,
                       here.lane);
    add_dq<C>(rdQ, p, launch, here, tile, visit);
    visit = next;
    stage = other;
  }
  epilogue<C>(smem, rdK, rdV, p, launch, here);
}

}  // namespace flash::sm80
