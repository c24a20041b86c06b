// The backward's preparation of its rows, with the scores of far ones by wgmma.
#pragma once

#include "base/ptx/shared_memory.h"
#include "base/ptx/tma.h"
#include "base/ptx/wgmma.h"
#include "base/static_for.h"
#include "hopper/tile_size.h"
#include "warp/bwd_prepare.h"

namespace flash::hopper {

// S^T = K Q^T of a block of queries and 64 keys, in the main kernel's way: the same roles of
// operands, the same order of 16 columns each.
template <Dtype kDtype>
class FarScores {
 public:
  static constexpr int kKeys = kWarpgroupRows;

  FLASH_DEVICE FarScores(const BwdParams& p, const BwdPrepareLaunch& launch, const FarBlock& rows)
      : p_(p), launch_(launch), rows_(rows) {}

  // By the whole CTA, a warpgroup.
  FLASH_DEVICE void multiply(int first) const {
    Shared& smem = shared();
    const uint32_t sK = ptx::shared_address(smem.k), sQ = ptx::shared_address(smem.q);
    const ptx::WgmmaMatrix k = ptx::wgmma_matrix<K::kRowBytes>(sK);
    const ptx::WgmmaMatrix q = ptx::wgmma_matrix<Q::kRowBytes>(sQ);
    float r[kPrepareRows / 8][4] = {};
#pragma unroll 1
    for (int column = 0; column < p_.d; column += kColumns) {
      copy<K, kKeys>(sK, column, launch_.k_aligned,
                     [&](int row) { return row_of_key(first + row); });
      copy<Q, kPrepareRows>(sQ, column, launch_.q_aligned,
                            [&](int row) { return row_of_query(row); });
      ptx::fence_proxy_async();
      __syncthreads();
      ptx::wgmma_keep_in_order(r);
      ptx::wgmma_fence();
      static_for<kColumns / 16>(
          [&](auto i) { ptx::wgmma_ss<kDtype>(r, k + i * 32, q + i * 32, true); });
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_keep_in_order(r);
      __syncthreads();
    }
#pragma unroll
    for (int n = 0; n < kPrepareRows / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const ptx::Element at = ptx::accumulator_element(lane(), i);
        smem.s[ptx::read_tid_x() / 32 * 16 + at.row][n * 8 + at.col] = r[n][i];
      }
    __syncthreads();
  }

  // S of 8 keys from first + within on.
  FLASH_DEVICE void load(float (&rS)[4], int, int within) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const ptx::Element at = ptx::accumulator_element(lane(), i);
      rS[i] = shared().s[within + at.col][at.row];
    }
  }

 private:
  static constexpr int kColumns = 64;
  using K = SmemTile<kColumns, kKeys>;
  using Q = SmemTile<kColumns, kPrepareRows>;
  struct Shared {
    alignas(1024) char k[K::kBytes];
    alignas(1024) char q[Q::kBytes];
    float s[kKeys][kPrepareRows + 1];
  };

  FLASH_DEVICE static Shared& shared() {
    __shared__ Shared smem;
    return smem;
  }
  FLASH_DEVICE static int lane() { return ptx::read_tid_x() % 32; }

  FLASH_DEVICE const char* row_of_key(int key) const {
    if (key >= rows_.seq.seqlen_k) return nullptr;
    return operand_row(p_.k, kDtype, rows_.seq.k_batch, rows_.seq.k_row + key,
                       rows_.head / launch_.group);
  }
  FLASH_DEVICE const char* row_of_query(int row) const {
    const int query = rows_.first_query + row;
    if (query >= rows_.seq.seqlen_q) return nullptr;
    return operand_row(p_.q, kDtype, rows_.seq.batch, rows_.seq.q_row + query, rows_.head);
  }

  // Columns from `column` on of kRows rows, pair by pair.
  template <class Smem, int kRows, class RowOf>
  FLASH_DEVICE void copy(uint32_t tile, int column, bool aligned, const RowOf& row_of) const {
#pragma unroll 1
    for (int i = ptx::read_tid_x(); i < kRows * kColumns / 2; i += kWarpgroupThreads) {
      const int row = i / (kColumns / 2), pair = i % (kColumns / 2);
      ptx::store_shared(tile + Smem::offset(row, pair / 4) + pair % 4 * 4,
                        load_pair(row_of(row), column + 2 * pair, static_cast<int>(p_.d), aligned));
    }
  }

  const BwdParams& p_;
  const BwdPrepareLaunch& launch_;
  const FarBlock& rows_;
};

template <RowConfig C>
FLASH_DEVICE void prepare(const BwdParams& p, const BwdPrepareLaunch& launch) {
  static_assert(C.threads() == kWarpgroupThreads);
  prepare_rows<C, FarScores>(p, launch);
}

}  // namespace flash::hopper
