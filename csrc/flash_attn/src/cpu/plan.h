// How work is cut into tasks: pure functions of shapes and lengths, the same for all instruction
// sets.
#pragma once

#include <cstdint>
#include <vector>

#include "common/seqlen.h"

namespace flash::cpu {

// Rows of a key-value head are (query, group member) pairs, query major; a task owns rows
// [row_begin, row_end) and walks over the keys [key_begin, key_end). Its result is a part of the
// softmax if num_splits > 1.
struct FwdTask {
  int batch = 0, head_k = 0;  // the first of `heads`
  int row_begin = 0, row_end = 0;
  int key_begin = 0, key_end = 0;
  int split = 0, num_splits = 1;
  int64_t partial_row = 0;  // of its first row in the buffer of partial results; the parts of a row
                            // block lie one after the other, row_end - row_begin rows each
  int heads = 1;          // neighbouring key-value heads; their parts lie one head after the other
  bool streamed = false;  // reads K and V unpacked (decode.h); heads > 1 only then
};

// What is streamed: sequences of few rows.
struct StreamTile {
  int rows = 0;       // of a key-value head, at most; 0: nothing is streamed
  int task_rows = 0;  // of all heads of a task, at most
  int heads = 1;      // of a task, at most
};

struct FwdTile {
  int rows;  // of a score tile; tasks start at multiples of it, so that results do not depend on
             // the task's size
  int keys;  // of a score tile, a multiple of 32
  int task_rows;  // at most, a multiple of rows
  StreamTile stream = {};
};

struct FwdPlan {
  std::vector<FwdTask> tasks;  // the longest first if several threads share them
  int64_t partial_rows = 0;
  double flops = 0;  // or what takes as long
};

// What a task takes: the products with the scores it sees, packing its keys, or reading them.
double task_flops(const Flash_fwd_params& params, const FwdTask& task);

FwdPlan plan_fwd(const Flash_fwd_params& params, const FwdTile& tile, int threads);

// Number of parts the keys of a sequence are cut into: a function of its own lengths and mask, or
// the caller's wish.
int num_splits(const Flash_fwd_params& params, const Sequence& seq, const FwdTile& tile);

// One key-value head of one sequence in the backward, cut into chunks of keys; sequences without
// keys have none.
struct BwdHead {
  int batch, head_k;
  int chunks;
};

struct BwdTask {
  int head;  // index in BwdPlan::heads
  int chunk;
};

// Tasks are taken in order. A task waits only for tasks before it: for the chunks before its own of
// the same head (sums into dq are in key order), and, in wave w > 0, for the head `wave_heads`
// before its own, whose dq slot it takes over.
struct BwdPlan {
  std::vector<BwdHead> heads;  // the longest first, unless they share a bias' gradient
  std::vector<BwdTask> tasks;
  int wave_heads = 1;    // heads in flight, each with a slot for the fp32 sums of dq
  int64_t max_rows = 0;  // rows of the longest head, with or without keys
  double flops = 0;
};

BwdPlan plan_bwd(const Flash_bwd_params& params, int chunk_keys, int threads);

}  // namespace flash::cpu
