// Which keys a CTA of the backward owns.
#pragma once

#include "common/bounded_sequence.h"
#include "warp/key_tile.h"
#include "warp/packed_tile.h"
#include "warp/report.h"

namespace flash {

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

// This CTA's number among the key blocks of a head, the first ones first, and the heads.
struct BwdNumber {
  int key_block, batch_head;  // key_block: of a packed batch, over all sequences

  FLASH_DEVICE explicit BwdNumber(const BwdTiles& launch) {
    const Tile_coordinates tile = launch.scheduler.tile(ptx::read_ctaid_x());
    key_block = launch.scheduler.m_blocks - 1 - tile.m_block;
    batch_head = tile.batch_head;
  }
};

// Puts this CTA's block of keys into shared memory; a warp does it.
template <int kM, int kN>
FLASH_DEVICE void find_key_tile(KeyTile& tile, const BwdParams& p, const BwdTiles& launch) {
  const BwdNumber number(launch);
  const bool is_packed = p.cu_seqlens_q != nullptr;
  PackedTile found{number.batch_head / launch.heads_k, number.key_block, 0};
  if (is_packed)
    found = packed_tile<kN>(p.cu_seqlens_k, p.seqlen_k, static_cast<int>(p.b), number.key_block,
                            launch.scheduler.m_blocks);
  const int q_blocks = is_packed ? query_blocks_before<kM>(p, found.batch)
                                 : found.batch * static_cast<int>(p.h) * launch.q_blocks;
  if (ptx::read_tid_x() % 32 == 0) {
    IndexFaults faults = 0;
    Sequence seq{};
    if (found.batch < p.b) seq = bounded_sequence(p, found.batch, launch.bounds.max_cached, faults);
    // Sequences that overlap may have more blocks than there is room for.
    if (is_packed && q_blocks + (seq.seqlen_q + kM - 1) / kM > launch.q_blocks) seq.seqlen_q = 0;
    const Mask mask = mask_of(p, seq);
    const int first_key = found.m_block * kN;
    tile = {found,
            seq,
            mask,
            number.batch_head % launch.heads_k,
            found.m_block,
            first_key,
            min(kN, seq.seqlen_k - first_key),
            BwdSchedule{mask, kM, kN}.visits(found.m_block),
            q_blocks};
    if (faults != 0) report(launch.bounds, faults);
  }
}

}  // namespace flash
