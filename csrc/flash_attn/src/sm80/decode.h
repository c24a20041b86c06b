// Attention of few queries over many keys, forward, for compute capability 8.0 and newer.
//
// The query heads that share a key-value head are rows of one tile: row r is query r / group of
// head r % group. A CTA of 4 warps owns 16 such rows, the height of an mma, and some units of the
// sequence's keys (common/split_heuristic.h). Its warps share no key: each takes every fourth block
// of 16 or 32 keys, which it fetches itself into a ring of its own, with Q, scores and the output
// in registers, so no warp waits for another until a unit ends. Then the warps' outputs are summed
// in shared memory (merge_units.h) and merged into what the CTA has so far; where several CTAs
// share a tile, they go to the workspace instead, and the last CTA to arrive merges them all.
//
// What bounds it is memory: K and V are read once, from 108 SMs of an A100 at 10 to 13 bytes a
// cycle of each. 512 bytes of them, a warp's cp.async, take one ldmatrix, two mma of which group /
// 16 is of use, and the rest of a softmax; docs/cuda.md has the sum. Copies under way, three of
// four slots of a ring, are 48 KiB for a CTA and cover the latency.
#pragma once

#include "base/ptx/special_registers.h"
#include "common/block_range.h"
#include "common/bounded_sequence.h"
#include "sm80/contain.h"
#include "sm80/decode_load.h"
#include "sm80/merge_units.h"
#include "sm80/query.h"
#include "sm80/report.h"
#include "sm80/score.h"
#include "sm80/steps.h"

namespace flash::sm80 {

// The keys that rows see.
struct FoldedMask {
  Mask mask;
  FastDivide group;
  int seqlen_k;

  FLASH_DEVICE int query(int row) const { return group.quotient(row); }
  FLASH_DEVICE KeyRange keys(int row) const { return mask.keys(query(row)); }
};

// Where this CTA is.
template <DecodeConfig C>
struct DecodePlace {
  int batch, head_k;
  int tile;       // of the launch
  int first_row;  // of the tile
  int rows;       // of the tile; none are left if it is not positive
  int sharer;     // which of the CTAs that share the tile
  Sequence seq;
  FoldedMask mask;

  // Has its sequence yet to be found.
  FLASH_DEVICE DecodePlace(const FwdParams& p, const DecodeLaunch& launch) {
    const int cta = ptx::read_ctaid_x();
    const int group_of_tiles = cta / launch.tiles;
    const int group_of_ctas = group_of_tiles / launch.ctas_per_tile;
    sharer = group_of_tiles - group_of_ctas * launch.ctas_per_tile;
    batch = group_of_ctas / static_cast<int>(p.h_k);
    head_k = group_of_ctas - batch * static_cast<int>(p.h_k);
    const int tile_of_head = cta - group_of_tiles * launch.tiles;
    tile = group_of_ctas * launch.tiles + tile_of_head;
    first_row = tile_of_head * kDecodeRows;
  }

  FLASH_DEVICE void take(const FwdParams& p, const DecodeLaunch& launch, const Sequence& found) {
    seq = found;
    mask = {mask_of(p, seq), launch.group, seq.seqlen_k};
    rows = min(seq.seqlen_q * launch.group.divisor - first_row, kDecodeRows);
  }

  // Row `row` of the tile.
  FLASH_DEVICE int query(int row) const { return mask.query(first_row + row); }
  FLASH_DEVICE int head(int row) const {
    return head_k * mask.group.divisor + first_row + row - query(row) * mask.group.divisor;
  }
  FLASH_DEVICE char* row_of(const Operand& x, int row) const {
    return operand_row(x, C.dtype, batch, seq.q_row + query(row), head(row));
  }
};

// One thread reads index tensors and checks them: the others need no registers for it.
template <DecodeConfig C>
FLASH_DEVICE void find_sequence(DecodePlace<C>& here, const FwdParams& p,
                                const DecodeLaunch& launch, Sequence& found) {
  if (ptx::read_tid_x() == 0) {
    IndexFaults faults;
    found = bounded_sequence(p, here.batch, launch.bounds.max_cached, faults);
    if (faults != 0) report(launch.bounds, faults);
  }
  __syncthreads();
  here.take(p, launch, found);
}

// One CTA of each sequence looks for pages that do not exist.
template <DecodeConfig C>
FLASH_DEVICE void check_pages(const FwdParams& p, const DecodeLaunch& launch,
                              const DecodePlace<C>& here) {
  if (here.seq.pages == nullptr || here.sharer != 0 || here.first_row != 0 || here.head_k != 0)
    return;
  const IndexFaults faults = page_faults(here.seq, launch.page_size, p.k_entries, C.threads());
  if (faults != 0) report(launch.bounds, faults);
}

// The blocks of keys that a tile's rows see, and this CTA's units of them.
template <DecodeConfig C>
struct KeyUnits {
  BlockRange seen;  // of single keys
  int first_key;    // of block 0
  int blocks, blocks_of_unit;
  int count;  // of units
  UnitShare mine;

  FLASH_DEVICE KeyUnits(const DecodeLaunch& launch, const DecodePlace<C>& here) {
    seen = block_range(here.mask.mask, here.query(0), here.query(here.rows - 1), 1);
    first_key = seen.begin / C.block_keys() * C.block_keys();
    const int keys = seen.end - first_key;
    blocks = (keys + C.block_keys() - 1) / C.block_keys();
    blocks_of_unit = unit_keys(keys, launch.num_splits, C.block_keys()) / C.block_keys();
    count = (blocks + blocks_of_unit - 1) / blocks_of_unit;
    mine = share_of(here.sharer, launch.ctas_per_tile, count);
  }

  FLASH_DEVICE int end_block(int unit) const { return min((unit + 1) * blocks_of_unit, blocks); }
};

// Q's rows to shared memory, by the whole CTA.
template <DecodeConfig C>
FLASH_DEVICE void load_q(const FwdParams& p, const DecodeLaunch& launch, const DecodePlace<C>& here,
                         uint32_t sQ) {
  constexpr int kChunksOfRow = C.head_dim / kChunkElements;
#pragma unroll 1
  for (int i = threadIdx.x; i < kDecodeRows * kChunksOfRow; i += C.threads()) {
    const int row = i / kChunksOfRow, chunk = i % kChunksOfRow;
    const uint32_t destination = sQ + SmemPlan<C>::Q::offset(row, chunk);
    const int columns = row < here.rows ? static_cast<int>(p.d) - chunk * kChunkElements : 0;
    const char* source = here.row_of(p.q, min(row, here.rows - 1)) + chunk * kChunkBytes;
    if (launch.q_aligned) {
      ptx::cp_async_16_bytes<0, 0>(destination, source, columns > 0);
    } else {
      copy_elements(destination, source, columns * kElementBytes);
    }
  }
  ptx::cp_async_commit_group();
}

// Negates and rotates Q, whose copies have landed.
template <DecodeConfig C>
FLASH_DEVICE void prepare_q(const FwdParams& p, const DecodeLaunch& launch,
                            const DecodePlace<C>& here, uint32_t sQ) {
  using Q = typename SmemPlan<C>::Q;
  if (launch.negate_q) {
    negate_q<Q, kDecodeRows, C.threads()>(sQ);
    __syncthreads();
  }
  if (p.rotary_dim == 0) return;
  const bool positions_differ = p.window_left >= 0 || p.window_right >= 0;
  rotate_q<C.dtype, Q, C.threads()>(p, sQ, here.rows, [&](int row) {
    return here.seq.cached + (positions_differ ? here.query(row) : 0);
  });
  __syncthreads();
}

// Operand A of the first product, all of it or read as it is needed.
template <DecodeConfig C>
class QueryTile {
 public:
  FLASH_DEVICE QueryTile(uint32_t sQ, int lane) : sQ_(lane_address<Q>(sQ, ptx::a_chunk(lane))) {
    if constexpr (kInRegisters) static_for<C.head_dim / 16>([&](auto k) { read<k>(rQ_[k]); });
  }

  template <int kK>
  FLASH_DEVICE void get(uint32_t (&a)[4]) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = rQ_[kK][i];
    } else {
      read<kK>(a);
    }
  }

 private:
  using Q = typename SmemPlan<C>::Q;
  static constexpr bool kInRegisters = C.tile().q_in_registers;

  template <int kK>
  FLASH_DEVICE void read(uint32_t (&a)[4]) const {
    ptx::ldmatrix_x4<Q::ahead(kK)>(a, sQ_ ^ Q::flip(kK));
  }

  uint32_t sQ_;  // this lane's address
  uint32_t rQ_[kInRegisters ? C.head_dim / 16 : 1][4];
};

// rS = Q sK^T of the warp's keys. `sK` is this lane's address.
template <DecodeConfig C>
FLASH_DEVICE void gemm_qk(typename WarpTile<C>::Scores& rS, const QueryTile<C>& q, uint32_t sK) {
  using K = typename SmemPlan<C>::K;
#pragma unroll
  for (int n = 0; n < WarpTile<C>::kS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) rS[0][n][i] = 0.f;
  static_for<C.head_dim / 16>([&](auto k) {
    uint32_t rQ[4];
    q.template get<k>(rQ);
    static_for<WarpTile<C>::kS / 2>([&](auto n) {
      uint32_t rK[4];
      ptx::ldmatrix_x4<n * 16 * K::kRowBytes + K::ahead(k)>(rK, sK ^ K::flip(k));
      ptx::mma_m16n8k16<C.dtype>(rS[0][2 * n], rQ, rK[0], rK[1]);
      ptx::mma_m16n8k16<C.dtype>(rS[0][2 * n + 1], rQ, rK[2], rK[3]);
    });
  });
}

// Hides the scores of keys that their row does not see.
template <DecodeConfig C>
FLASH_DEVICE void apply_mask(typename WarpTile<C>::Scores& rS, const FoldedMask& mask,
                             int first_row, int first_key) {
  const int lane = ptx::read_tid_x() % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const ptx::Element first = ptx::accumulator_element(lane, 2 * half);
    const KeyRange keys = mask.keys(first_row + first.row);
    const int begin = keys.begin - (first_key + first.col);
    const int end = keys.end - (first_key + first.col);
#pragma unroll
    for (int n = 0; n < WarpTile<C>::kS; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = n * 8 + i;
        if (key < begin || key >= end) rS[0][n][2 * half + i] = -INFINITY;
      }
    }
  }
}

// rS: products of q and k become natural logits, softcap(softmax_scale s) - slope |distance|.
template <DecodeConfig C>
FLASH_DEVICE void modify_scores(typename WarpTile<C>::Scores& rS, const ScoreParams& p,
                                const DecodePlace<C>& here, int first_key) {
  if (p.softcap > 0.f) {
    cap_scores<C>(rS, p);
  } else {
    for_each_score<C>(rS, [&](float& s, int, int) { s *= p.scale_softmax; });
  }
  if (p.alibi_slopes == nullptr) return;
  const ptx::Element first = ptx::accumulator_element(ptx::read_tid_x() % 32, 0);
  float slope[2], distance[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = min(first.row + 8 * half, here.rows - 1);
    slope[half] = p.alibi_slopes[here.batch * p.alibi_batch_stride + here.head(row)];
    const int diagonal = here.query(row) + here.seq.seqlen_k - here.seq.seqlen_q;
    distance[half] = static_cast<float>(diagonal - first_key - first.col);
  }
  for_each_score<C>(rS, [&](float& s, int row, int column) {
    s = fmaf(-slope[row / 8], fabsf(distance[row / 8] - static_cast<float>(column)), s);
  });
}

// What a warp's steps need to know beside its keys.
template <DecodeConfig C>
struct DecodeSteps {
  const FwdParams& p;
  const DecodeLaunch& launch;
  const DecodePlace<C>& here;
  const BlockRange& seen;
  int lane;

  FLASH_DEVICE bool is_full(int key) const {
    return seen.full_begin <= key && key + C.tile().n <= seen.full_end;
  }

  // A step over a block of K: its probabilities rP, and rO to the new maxima.
  FLASH_DEVICE void attend(typename WarpTile<C>::Probabilities& rP,
                           typename WarpTile<C>::Output& rO, typename WarpTile<C>::Rows& rows,
                           const QueryTile<C>& q, uint32_t sK, int key) const {
    typename WarpTile<C>::Scores rS;
    float rescale[1][2];
    gemm_qk<C>(rS, q, lane_address<typename SmemPlan<C>::K>(sK, ptx::b_chunk_n_major(lane)));
    if (launch.modifies_scores) modify_scores<C>(rS, p, here, key);
    if (!is_full(key)) apply_mask<C>(rS, here.mask, here.first_row, key);
    softmax_step<C>(rP, rescale, rS, rows, launch.scale_log2);
    rescale_o<C>(rO, rescale);
  }

  // A step over a block of V.
  FLASH_DEVICE void accumulate(typename WarpTile<C>::Output& rO,
                               const typename WarpTile<C>::Probabilities& rP, uint32_t sV,
                               int key) const {
    if (!is_full(key) && !is_finite<C>(sV)) {
      gemm_pv_by_keys<C>(rO, rP, sV, here.mask, here.first_row, key);
    } else {
      gemm_pv<C>(rO, rP, lane_address<typename SmemPlan<C>::V>(sV, ptx::b_chunk_k_major(lane)));
    }
  }
};

template <DecodeConfig C>
FLASH_DEVICE KeyRows key_rows(const DecodePlace<C>& here, const Operand& x, int64_t head_dim,
                              bool aligned) {
  const Sequence& seq = here.seq;
  const char* first =
      seq.pages ? operand_row(x, C.dtype, 0, 0, here.head_k)
                : operand_row(x, C.dtype, seq.k_batch, seq.k_row + seq.leftpad, here.head_k);
  return {first, x.row_stride * kElementBytes, x.batch_stride * kElementBytes,
          static_cast<int>(head_dim), aligned};
}

// Where this warp's keys and values are.
template <DecodeConfig C>
FLASH_DEVICE typename WarpBlocks<C>::Source key_source(const FwdParams& p,
                                                       const DecodeLaunch& launch,
                                                       const DecodePlace<C>& here,
                                                       const KeyUnits<C>& units, int warp) {
  return {key_rows<C>(here, p.k, p.d, launch.k_aligned),
          key_rows<C>(here, p.v, p.d_v, launch.v_aligned),
          {here.seq.pages, static_cast<int>(p.k_entries), here.seq.leftpad, launch.page_size},
          here.seq.seqlen_k,
          units.first_key + warp * C.tile().n,
          units.seen.begin,
          units.seen.end};
}

// Writes this thread's part of out and softmax_lse.
template <DecodeConfig C>
FLASH_DEVICE void store_total(const FwdParams& p, const DecodeLaunch& launch,
                              const DecodePlace<C>& here, Total<C>& total) {
  using Q = Quads<C>;
  const int row = Q::row();
  if (row >= here.rows) return;
  const int head = here.head(row);
  float unit = launch.scale, factor = 1.f;
  const float sink = sink_logit(p, head);
  if (sink != -INFINITY) factor = add_sink(total.state, unit, sink);
  factor *= total.state.inverse_sum();
  if (p.softmax_lse != nullptr && Q::column(0) == 0)
    p.softmax_lse[here.batch * p.lse_batch_stride + head * p.lse_head_stride + here.seq.lse_row +
                  here.query(row)] = total.state.lse(unit);
  char* gO = here.row_of(p.o, row);
#pragma unroll
  for (int i = 0; i < Q::kCount; ++i) {
    const float4& o = total.output[i];
    const uint2 packed{ptx::pack<C.dtype>(o.x * factor, o.y * factor),
                       ptx::pack<C.dtype>(o.z * factor, o.w * factor)};
    char* destination = gO + Q::column(i) * kElementBytes;
    const int columns = static_cast<int>(p.d_v) - Q::column(i);
    if (launch.o_aligned && columns >= 4) {
      *reinterpret_cast<uint2*>(destination) = packed;
    } else {
      store_elements(destination, {packed.x, packed.y, 0, 0}, min(columns, 4) * kElementBytes);
    }
  }
}

// Rows of out that belong to no sequence become 0, their softmax_lse -inf: those of the heads of
// this CTA's group, its share of them.
template <DecodeConfig C>
FLASH_DEVICE void store_rows_of_no_sequence(const FwdParams& p, const DecodeLaunch& launch,
                                            const DecodePlace<C>& here) {
  const int step = launch.tiles * launch.ctas_per_tile, group = launch.group.divisor;
  const int64_t first = p.cu_seqlens_q[p.b], rows = (p.total_q - first) * group;
  if (first < 0) return;
  for (int64_t i = ptx::read_ctaid_x() % step; i < rows; i += step) {
    const int64_t row = first + i / group, head = here.head_k * group + i % group;
    auto* o = reinterpret_cast<uint16_t*>(operand_row(p.o, C.dtype, 0, row, head));
    for (int j = threadIdx.x; j < p.d_v; j += C.threads()) o[j] = 0;
    if (p.softmax_lse != nullptr && threadIdx.x == 0)
      p.softmax_lse[head * p.lse_head_stride + row] = -INFINITY;
  }
}

// Unit `unit` of this tile in the workspace.
template <DecodeConfig C>
FLASH_DEVICE Unit kept_unit(const DecodeLaunch& launch, int tile, int unit) {
  const int64_t row = (static_cast<int64_t>(tile) * launch.max_units + unit) * launch.unit_rows;
  return {launch.unit_states + row, launch.unit_outputs + row * C.head_dim_v, C.head_dim_v};
}

// This CTA's units: merged into `total` if it has the tile for itself, else kept in the workspace.
template <DecodeConfig C>
FLASH_DEVICE void attend_units(Total<C>& total, const FwdParams& p, const DecodeLaunch& launch,
                               const DecodePlace<C>& here, const KeyUnits<C>& units,
                               SmemPlan<C>& plan) {
  const int lane = ptx::read_tid_x() % 32;
  const int warp = __shfl_sync(0xffffffffu, ptx::read_tid_x() / 32, 0);  // known to be uniform
  const uint32_t sQ = ptx::shared_address(&plan) + SmemPlan<C>::q_offset();
  load_q<C>(p, launch, here, sQ);
  WarpBlocks<C> keys(key_source<C>(p, launch, here, units, warp),
                     ptx::shared_address(plan.ring[warp]), lane,
                     units.mine.begin * units.blocks_of_unit, units.end_block(units.mine.end - 1));
  ptx::cp_async_wait_group<C.tile().stages - 1>();
  __syncthreads();
  prepare_q<C>(p, launch, here, sQ);
  const QueryTile<C> q(sQ, lane);
  const DecodeSteps<C> steps{p, launch, here, units.seen, lane};
  const WarpSum<C> sum_warps(plan, warp, lane);
  for (int unit = units.mine.begin; unit < units.mine.end; ++unit) {
    typename WarpTile<C>::Output rO = {};
    typename WarpTile<C>::Rows rows;
    clear_rows<C>(rows);
    for (int block = unit * units.blocks_of_unit; block < units.end_block(unit); ++block) {
      typename WarpTile<C>::Probabilities rP;
      const int key = keys.key(block);
      const uint32_t sK = keys.next_k(block);
      if (keys.is_seen(block)) steps.attend(rP, rO, rows, q, sK, key);
      const uint32_t sV = keys.next_v(block);
      if (keys.is_seen(block)) steps.accumulate(rO, rP, sV, key);
    }
    sum_warps(rO, rows, launch.scale_log2);
    const Unit result{plan.states, plan.output[0], SmemPlan<C>::kOutputStride};
    if (units.mine.sharers == 1) {
      total.take(result, here.rows, launch.scale_log2);
    } else {
      store_unit<C>(kept_unit<C>(launch, here.tile, unit), result, here.rows);
    }
  }
}

template <DecodeConfig C>
FLASH_DEVICE void mha_decode(const FwdParams& p, const DecodeLaunch& launch) {
  extern __shared__ __align__(1024) char smem[];
  auto& plan = *reinterpret_cast<SmemPlan<C>*>(smem);
  DecodePlace<C> here(p, launch);
  if (here.batch == p.b) return store_rows_of_no_sequence<C>(p, launch, here);
  find_sequence(here, p, launch, plan.sequence);
  check_pages(p, launch, here);
  if (here.rows <= 0) return;
  const KeyUnits<C> units(launch, here);
  if (here.sharer >= units.mine.sharers) return;

  Total<C> total;
  if (units.count > 0) attend_units<C>(total, p, launch, here, units, plan);
  if (units.mine.sharers > 1) {
    if (!arrives_last(launch.arrivals + here.tile, units.mine.sharers, plan.is_last)) return;
    Unit unit = kept_unit<C>(launch, here.tile, 0);
#pragma unroll 4
    for (int i = 0; i < units.count; ++i, unit.skip(launch.unit_rows))
      total.take(unit, here.rows, launch.scale_log2);
  }
  store_total<C>(p, launch, here, total);
}

}  // namespace flash::sm80
