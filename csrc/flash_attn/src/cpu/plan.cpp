#include "cpu/plan.h"

#include <algorithm>

namespace flash::cpu {
namespace {

constexpr int kSplitKeys = 640;  // keys of a part when the caller leaves the number of splits open
constexpr int kStreamKeys = 160;  // parts of a streamed sequence are multiples of it
constexpr int kTasksPerThread = 4;
constexpr double kFlopsPerByte = 5;  // that take as long as reading it: 50 GFLOP/s, 10 GB/s a core

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

double task_flops(const Flash_fwd_params& p, const FwdTask& t) {
  const double elements = static_cast<double>(t.key_end - t.key_begin) * (p.d + p.d_v) * t.heads;
  const double flops = 2. * (t.row_end - t.row_begin) * elements;
  return t.streamed ? std::max(flops, kFlopsPerByte * dtype_bytes(p.dtype) * elements) : flops;
}

int rows_of(const Flash_fwd_params& p, const Sequence& seq) {
  return seq.seqlen_q * static_cast<int>(p.h / p.h_k);
}

bool is_streamed(const Flash_fwd_params& p, const Sequence& seq, const FwdTile& tile) {
  return rows_of(p, seq) <= tile.stream.rows;
}

// Keys that any query of a sequence sees.
KeyRange seen_keys(const Flash_fwd_params& p, const Sequence& seq) {
  return mask_of(p, seq).keys(0, seq.seqlen_q - 1);
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

// Heads of a streamed task: as many as lie together, fewer when that would leave threads without
// work.
int stream_heads(const Flash_fwd_params& p, const FwdTile& tile, int threads) {
  int heads = tile.stream.heads;
  for (; threads > 1 && heads > 1; heads /= 2) {
    int64_t tasks = 0;
    for (int b = 0; b < p.b; ++b) {
      const Sequence seq = sequence(p, b);
      if (seq.seqlen_q > 0 && is_streamed(p, seq, tile))
        tasks += int64_t{num_splits(p, seq, tile)} * ceil_div(p.h_k, heads);
    }
    if (tasks >= static_cast<int64_t>(kTasksPerThread) * threads) break;
  }
  return std::max(heads, 1);
}

void add_task(const Flash_fwd_params& p, const FwdTask& task, FwdPlan& plan) {
  plan.flops += task_flops(p, task);
  plan.tasks.push_back(task);
}

void plan_streamed(const Flash_fwd_params& p, const Sequence& seq, const FwdTile& tile,
                   int heads_per_task, FwdPlan& plan) {
  const int rows = rows_of(p, seq);
  const KeyRange keys = seen_keys(p, seq);
  const int splits = num_splits(p, seq, tile);
  const int split_keys =
      ceil_div(ceil_div(keys.end - keys.begin, splits), kStreamKeys) * kStreamKeys;
  const int most_heads = std::min(heads_per_task, std::max(1, tile.stream.task_rows / rows));
  for (int head_k = 0; head_k < p.h_k; head_k += most_heads) {
    const int heads = std::min(most_heads, static_cast<int>(p.h_k) - head_k);
    for (int split = 0; split < splits; ++split) {
      const int64_t begin = keys.begin + static_cast<int64_t>(split) * split_keys;
      const int key_begin = static_cast<int>(std::min<int64_t>(keys.end, begin));
      const int key_end = static_cast<int>(std::min<int64_t>(keys.end, begin + split_keys));
      add_task(p,
               {seq.batch, head_k, 0, rows, key_begin, key_end, split, splits,
                plan.partial_rows + int64_t{split} * rows, heads, true},
               plan);
    }
    if (splits > 1) plan.partial_rows += int64_t{heads} * splits * rows;
  }
}

void plan_sequence(const Flash_fwd_params& p, const Sequence& seq, const FwdTile& tile,
                   int rows_per_task, FwdPlan& plan) {
  const int group = static_cast<int>(p.h / p.h_k);
  const int rows = rows_of(p, seq);
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
        add_task(p, t, plan);
      }
    }
  }
}

}  // namespace

int num_splits(const Flash_fwd_params& p, const Sequence& seq, const FwdTile& tile) {
  const bool streamed = is_streamed(p, seq, tile);
  const KeyRange seen = streamed ? seen_keys(p, seq) : KeyRange{0, seq.seqlen_k};
  const int keys = seen.end - seen.begin;
  const int smallest_part = streamed ? kStreamKeys : tile.keys;
  if (keys <= smallest_part) return 1;
  if (p.num_splits > 0)
    return static_cast<int>(std::min<int64_t>(p.num_splits, ceil_div(keys, smallest_part)));
  const bool few_rows = streamed || rows_of(p, seq) <= tile.rows;
  return few_rows ? std::min(FLASH_ATTN_MAX_SPLITS, ceil_div(keys, kSplitKeys)) : 1;
}

FwdPlan plan_fwd(const Flash_fwd_params& p, const FwdTile& tile, int threads) {
  FwdPlan plan;
  const int rows = task_rows(p, tile, threads);
  const int heads = stream_heads(p, tile, threads);
  for (int b = 0; b < p.b; ++b) {
    const Sequence seq = sequence(p, b);
    if (seq.seqlen_q == 0) continue;
    if (is_streamed(p, seq, tile))
      plan_streamed(p, seq, tile, heads, plan);
    else
      plan_sequence(p, seq, tile, rows, plan);
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
