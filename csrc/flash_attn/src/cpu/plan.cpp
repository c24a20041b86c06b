#include "cpu/plan.h"

#include <algorithm>

namespace flash::cpu {
namespace {

constexpr int kSplitKeys = 1024;  // keys of a part when the caller leaves the number of splits open
constexpr int kTasksPerThread = 4;

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

double task_flops(const Flash_fwd_params& p, const FwdTask& t) {
  return 2.0 * (t.row_end - t.row_begin) * (t.key_end - t.key_begin) *
         static_cast<double>(p.d + p.d_v);
}

// Rows of a task: as many as share a block of keys well, fewer when that would leave threads
// without work.
int task_rows(const Flash_fwd_params& p, const FwdTile& tile, int threads) {
  if (threads == 1) return tile.task_rows;
  const int64_t group = p.h / p.h_k;
  for (int rows = tile.task_rows; rows > tile.rows; rows = rows / 2 / tile.rows * tile.rows) {
    int64_t tasks = 0;
    for (int b = 0; b < p.b; ++b) tasks += p.h_k * ceil_div(sequence(p, b).seqlen_q * group, rows);
    if (tasks >= static_cast<int64_t>(kTasksPerThread) * threads) return rows;
  }
  return tile.rows;
}

void plan_sequence(const Flash_fwd_params& p, const Sequence& seq, const FwdTile& tile,
                   int rows_per_task, FwdPlan& plan) {
  const int group = static_cast<int>(p.h / p.h_k);
  const int rows = seq.seqlen_q * group;
  const Mask mask = mask_of(p, seq);
  const int splits = num_splits(p, seq, tile);
  const int split_keys = ceil_div(ceil_div(seq.seqlen_k, splits), tile.keys) * tile.keys;
  for (int head_k = 0; head_k < p.h_k; ++head_k) {
    for (int row = 0; row < rows; row += rows_per_task) {
      const int row_end = std::min(rows, row + rows_per_task);
      const KeyRange keys = mask.keys(row / group, (row_end - 1) / group);
      for (int split = 0; split < splits; ++split) {
        FwdTask t{seq.batch, head_k, row, row_end, keys.begin, keys.end, split, splits, 0};
        if (splits > 1) {
          t.key_begin = std::max<int64_t>(keys.begin, static_cast<int64_t>(split) * split_keys);
          t.key_end = std::max<int64_t>(t.key_begin,
                                        std::min<int64_t>(keys.end, (split + 1LL) * split_keys));
          t.partial_row = plan.partial_rows;
          plan.partial_rows += row_end - row;
        }
        plan.flops += task_flops(p, t);
        plan.tasks.push_back(t);
      }
    }
  }
}

}  // namespace

int num_splits(const Flash_fwd_params& p, const Sequence& seq, const FwdTile& tile) {
  if (seq.seqlen_k <= tile.keys) return 1;
  if (p.num_splits > 0)
    return static_cast<int>(std::min<int64_t>(p.num_splits, ceil_div(seq.seqlen_k, tile.keys)));
  const bool few_rows = seq.seqlen_q * (p.h / p.h_k) <= tile.rows;
  return few_rows ? std::min(FLASH_ATTN_MAX_SPLITS, ceil_div(seq.seqlen_k, kSplitKeys)) : 1;
}

FwdPlan plan_fwd(const Flash_fwd_params& p, const FwdTile& tile, int threads) {
  FwdPlan plan;
  const int rows = task_rows(p, tile, threads);
  for (int b = 0; b < p.b; ++b) {
    const Sequence seq = sequence(p, b);
    if (seq.seqlen_q > 0) plan_sequence(p, seq, tile, rows, plan);
  }
  if (threads > 1)
    std::stable_sort(plan.tasks.begin(), plan.tasks.end(), [&](const FwdTask& x, const FwdTask& y) {
      return task_flops(p, x) > task_flops(p, y);
    });
  return plan;
}

BwdPlan plan_bwd(const Flash_bwd_params& p, int chunk_keys, int threads) {
  BwdPlan plan;
  const int64_t group = p.h / p.h_k;
  for (int b = 0; b < p.b; ++b) {
    const Sequence seq = sequence(p, b);
    plan.max_rows = std::max(plan.max_rows, seq.seqlen_q * group);
    plan.flops += 10.0 * p.h * seq.seqlen_q * seq.seqlen_k * static_cast<double>(p.d + p.d_v) / 2;
    if (seq.seqlen_k == 0) continue;
    for (int head_k = 0; head_k < p.h_k; ++head_k)
      plan.heads.push_back({b, head_k, ceil_div(seq.seqlen_k, chunk_keys)});
  }
  // Sums into a bias' gradient that several heads share are made one head after the other.
  const bool heads_share_bias = p.dbias.ptr && (p.dbias.b < p.b || p.dbias.h < p.h);
  plan.wave_heads =
      heads_share_bias ? 1 : static_cast<int>(std::min<int64_t>(threads, plan.heads.size()));
  plan.wave_heads = std::max(plan.wave_heads, 1);
  for (size_t wave = 0; wave < plan.heads.size(); wave += plan.wave_heads) {
    const size_t end = std::min(plan.heads.size(), wave + plan.wave_heads);
    int chunks = 0;
    for (size_t h = wave; h < end; ++h) chunks = std::max(chunks, plan.heads[h].chunks);
    for (int chunk = 0; chunk < chunks; ++chunk)
      for (size_t h = wave; h < end; ++h)
        if (chunk < plan.heads[h].chunks) plan.tasks.push_back({static_cast<int>(h), chunk});
  }
  return plan;
}

}  // namespace flash::cpu
