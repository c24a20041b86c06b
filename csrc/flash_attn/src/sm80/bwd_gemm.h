// The backward's products of a CTA's P and dS with Q, dO and K.
#pragma once

#include "base/ptx/special_registers.h"
#include "common/mask.h"
#include "sm80/bwd_load.h"
#include "sm80/query.h"
#include "sm80/tile_gemm.h"
#include "warp/contain.h"

namespace flash::sm80 {

// What the warps of a CTA share out for dV and dK (n keys x head dim), and for dQ (m queries x head
// dim). Of columns, and of keys for dV and dK, a warp takes every so many-th block of 16, of
// queries neighbours.
template <BwdConfig C>
struct BwdWarps {
  static constexpr BwdTile kTile = C.tile();
  static constexpr int kKeyWarps = kTile.kv_key_warps, kKvColumnWarps = kTile.warps / kKeyWarps;
  static constexpr int kQueryWarps = kTile.q_query_warps, kQColumnWarps = kTile.warps / kQueryWarps;
  static constexpr int kRows = kTile.m / kQueryWarps;
  using KeyGradient = Accumulators<kTile.n / kKeyWarps / 16, C.head_dim / kKvColumnWarps / 8>;
  using QueryGradient = Accumulators<kRows / 16, C.head_dim / kQColumnWarps / 8>;

  // The first key or query of a warp's m16 tile, the first column of its n8 tile.
  FLASH_DEVICE static int key(int warp, int m) { return (warp % kKeyWarps + m * kKeyWarps) * 16; }
  FLASH_DEVICE static int row(int warp, int m) { return warp % kQueryWarps * kRows + m * 16; }
  FLASH_DEVICE static int kv_column(int warp, int n) {
    return (warp / kKeyWarps + n / 2 * kKvColumnWarps) * 16 + n % 2 * 8;
  }
  FLASH_DEVICE static int q_column(int warp, int n) {
    return (warp / kQueryWarps + n / 2 * kQColumnWarps) * 16 + n % 2 * 8;
  }
};

// r += A^T B, gradients of keys, of P or dS and dO or Q.
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
  const int rows = warp % Warps::kQueryWarps * Warps::kRows, columns = warp / Warps::kQueryWarps;
  gemm<C.dtype, C.tile().n / 16>(
      r, SumAlongRows<typename Plan::P>{scores + Plan::P::offset(rows + a.row, a.chunk)},
      SumDownColumns<typename Plan::K, Warps::kQColumnWarps>{
          keys + Plan::K::offset(b.row, 2 * columns + b.chunk)});
}

// A barrier of the CTA; whether some keys of the block are hidden and Q, dO or K is not finite: 0
// times that must not reach a gradient across a hidden pair.
template <BwdConfig C>
FLASH_DEVICE bool is_cut_and_not_finite(uint32_t smem, uint32_t stage, bool is_full) {
  using Plan = BwdSmemPlan<C>;
  using Stage = typename Plan::Stage;
  if (is_full) {
    __syncthreads();
    return false;
  }
  const bool is_finite =
      is_share_finite<typename Plan::Q, C.dtype, C.threads()>(stage + offsetof(Stage, q)) &&
      is_share_finite<typename Plan::Q, C.dtype, C.threads()>(stage + offsetof(Stage, dout)) &&
      is_share_finite<typename Plan::K, C.dtype, C.threads()>(smem + offsetof(Plan, k));
  return __syncthreads_or(!is_finite);
}

// Whether a query of a block sees a key of this CTA's; numbers within both.
template <BwdConfig C>
FLASH_DEVICE bool sees(const KeyTile& here, const QueryBlock& queries, int row, int key) {
  const int query = queries.block * C.tile().m + row;
  const KeyRange keys = here.mask.keys(query);
  key += here.first_key;
  return query < here.mask.seqlen_q && keys.begin <= key && key < keys.end;
}

// dV or dK, r += A^T B; `by_element`: over the pairs of queries and keys that see each other alone.
template <BwdConfig C>
FLASH_DEVICE void add_keys(typename BwdWarps<C>::KeyGradient& r, uint32_t scores, uint32_t rows,
                           const KeyTile& here, const QueryBlock& queries, bool by_element) {
  using Plan = BwdSmemPlan<C>;
  using Warps = BwdWarps<C>;
  const int warp = this_warp<C>();  // by all lanes: a shuffle
  if (!by_element) return gemm_of_keys<C>(r, scores, rows, warp, this_lane<C>());
  const ptx::Element first = ptx::accumulator_element(this_lane<C>(), 0);
  multiply_by_element<C.dtype>(
      r, C.tile().m, [&](int i) { return Warps::key(warp, i / 2) + i % 2 * 8 + first.row; },
      [&](int key, int row) { return sees<C>(here, queries, row, key); },
      [&](int key, int row) { return element_address<typename Plan::P>(scores, row, key); },
      [&](int row, int n) {
        return element_address<typename Plan::Q>(rows, row, Warps::kv_column(warp, n) + first.col);
      });
}

// rdQ = dS K.
template <BwdConfig C>
FLASH_DEVICE void multiply_queries(typename BwdWarps<C>::QueryGradient& r, uint32_t scores,
                                   uint32_t keys, const KeyTile& here, const QueryBlock& queries,
                                   bool by_element) {
  using Plan = BwdSmemPlan<C>;
  using Warps = BwdWarps<C>;
  clear(r);
  const int warp = this_warp<C>();
  if (!by_element) return gemm_of_queries<C>(r, scores, keys, warp, this_lane<C>());
  const ptx::Element first = ptx::accumulator_element(this_lane<C>(), 0);
  multiply_by_element<C.dtype>(
      r, C.tile().n, [&](int i) { return Warps::row(warp, i / 2) + i % 2 * 8 + first.row; },
      [&](int row, int key) { return sees<C>(here, queries, row, key); },
      [&](int row, int key) { return element_address<typename Plan::P>(scores, row, key); },
      [&](int key, int n) {
        return element_address<typename Plan::K>(keys, key, Warps::q_column(warp, n) + first.col);
      });
}

}  // namespace flash::sm80
