#include "cpu/plan.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

namespace flash::cpu {
namespace {

constexpr int kSplitKeys = 640;   // keys of a part when the caller leaves the number of splits open
constexpr int kStreamKeys = 160;  // parts of a streamed sequence are multiples of it
constexpr int kTasksPerThread = 4;
constexpr double kPackRows = 30;     // rows whose products with a key take as long as packing it
constexpr double kFlopsPerByte = 5;  // that take as long as reading it: 50 GFLOP/s, 10 GB/s a core

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int rows_of(const Attention_params& p, const Sequence& seq) {
  return seq.seqlen_q * static_cast<int>(p.h / p.h_k);
}

bool is_streamed(const Flash_fwd_params& p, const Sequence& seq, const FwdTile& tile) {
  return rows_of(p, seq) <= tile.stream.rows;
}

// Keys that any query of a sequence sees.
KeyRange seen_keys(const Attention_params& p, const Sequence& seq) {
  return mask_of(p, seq).keys(0, seq.seqlen_q - 1);
}

// Scores that rows [task.row_begin, task.row_end) see: exact where their number changes evenly from
// the first row to the last.
double seen_scores(const Attention_params& p, const Sequence& seq, const FwdTask& task) {
  const int group = static_cast<int>(p.h / p.h_k);
  const Mask mask = mask_of(p, seq);
  const auto seen = [&](int row) {
    const KeyRange keys = mask.keys(row / group);
    return std::max(0, std::min(keys.end, task.key_end) - std::max(keys.begin, task.key_begin));
  };
  return .5 * (task.row_end - task.row_begin) * (seen(task.row_begin) + seen(task.row_end - 1));
}

// The end of the last thread when each takes the next task once it is free.
double finish_time(std::vector<double>& tasks, int threads) {
  std::sort(tasks.begin(), tasks.end(), std::greater<>());
  std::priority_queue<double, std::vector<double>, std::greater<>> ends(
      std::greater<>(), std::vector<double>(threads, 0.));
  double last = 0;
  for (double task : tasks) {
    const double end = ends.top() + task;
    ends.pop();
    ends.push(end);
    last = std::max(last, end);
  }
  return last;
}

// Work of the packed tasks of at most `rows` rows.
std::vector<double> packed_work(const Flash_fwd_params& p, const FwdTile& tile, int rows) {
  const int group = static_cast<int>(p.h / p.h_k);
  std::vector<double> work;
  for (int b = 0; b < p.b; ++b) {
    const Sequence seq = sequence(p, b);
    if (is_streamed(p, seq, tile)) continue;
    FwdTask task{.batch = b, .key_end = seq.seqlen_k};
    for (const int end = rows_of(p, seq); task.row_begin < end; task.row_begin = task.row_end) {
      task.row_end = std::min(end, task.row_begin + rows);
      const KeyRange keys =
          mask_of(p, seq).keys(task.row_begin / group, (task.row_end - 1) / group);
      task.key_begin = keys.begin;
      task.key_end = keys.end;
      work.insert(work.end(), p.h_k, task_flops(p, task));
    }
  }
  return work;
}

// Rows of a task: of many rows packing is cheap, of few the threads finish together.
int task_rows(const Flash_fwd_params& p, const FwdTile& tile, int threads) {
  int best = tile.task_rows;
  if (threads == 1) return best;
  double best_time = 0;
  for (int rows = best; rows >= tile.rows; rows -= tile.rows) {
    std::vector<double> work = packed_work(p, tile, rows);
    const double time = finish_time(work, threads);
    if (rows == tile.task_rows || time < .99 * best_time) {
      best = rows;
      best_time = time;
    }
    const double mean = std::accumulate(work.begin(), work.end(), 0.) / threads;
    if (best_time <= 1.05 * mean) break;  // smaller tasks only pack more
  }
  return best;
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

void sort_longest_first(const Flash_fwd_params& p, std::vector<FwdTask>& tasks) {
  std::vector<std::pair<double, FwdTask>> by_length;
  by_length.reserve(tasks.size());
  for (const FwdTask& task : tasks) by_length.emplace_back(task_flops(p, task), task);
  std::stable_sort(by_length.begin(), by_length.end(),
                   [](const auto& x, const auto& y) { return x.first > y.first; });
  for (size_t i = 0; i < tasks.size(); ++i) tasks[i] = by_length[i].second;
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
               {.batch = seq.batch,
                .head_k = head_k,
                .row_end = rows,
                .key_begin = key_begin,
                .key_end = key_end,
                .split = split,
                .num_splits = splits,
                .partial_row = plan.partial_rows + int64_t{split} * rows,
                .heads = heads,
                .streamed = true},
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
        FwdTask t{.batch = seq.batch,
                  .head_k = head_k,
                  .row_begin = row,
                  .row_end = row_end,
                  .key_begin = keys.begin,
                  .key_end = keys.end,
                  .split = split,
                  .num_splits = splits};
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

// The chunks of a wave's heads in turn.
void add_bwd_tasks(BwdPlan& plan) {
  for (size_t wave = 0; wave < plan.heads.size(); wave += plan.wave_heads) {
    const size_t end = std::min(plan.heads.size(), wave + plan.wave_heads);
    int chunks = 0;
    for (size_t h = wave; h < end; ++h) chunks = std::max(chunks, plan.heads[h].chunks);
    for (int chunk = 0; chunk < chunks; ++chunk)
      for (size_t h = wave; h < end; ++h)
        if (chunk < plan.heads[h].chunks)
          plan.tasks.push_back({.head = static_cast<int>(h), .chunk = chunk});
  }
}

}  // namespace

double task_flops(const Flash_fwd_params& p, const FwdTask& task) {
  const Sequence seq = sequence(p, task.batch);
  const double keys = task.key_end - task.key_begin, dims = static_cast<double>(p.d + p.d_v);
  const double products = 2. * task.heads * dims * seen_scores(p, seq, task);
  if (task.streamed)
    return std::max(products, kFlopsPerByte * dtype_bytes(p.kv_dtype) * task.heads * keys * dims);
  return products + 2. * dims * kPackRows * keys;
}

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
  if (threads > 1) sort_longest_first(p, plan.tasks);
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
      plan.heads.push_back(
          {.batch = b, .head_k = head_k, .chunks = ceil_div(seq.seqlen_k, chunk_keys)});
  }
  // Sums into a bias' gradient that several heads share are made one head after the other.
  const bool heads_share_bias = p.dbias.ptr && (p.dbias.b < p.b || p.dbias.h < p.h);
  if (!heads_share_bias) {
    const auto work = [&](const BwdHead& head) {
      return int64_t{head.chunks} * sequence(p, head.batch).seqlen_q;
    };
    std::stable_sort(plan.heads.begin(), plan.heads.end(),
                     [&](const BwdHead& x, const BwdHead& y) { return work(x) > work(y); });
  }
  plan.wave_heads =
      heads_share_bias ? 1 : static_cast<int>(std::min<int64_t>(threads, plan.heads.size()));
  plan.wave_heads = std::max(plan.wave_heads, 1);
  add_bwd_tasks(plan);
  return plan;
}

}  // namespace flash::cpu
