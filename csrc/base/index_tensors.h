// Tensors whose elements tell where other tensors are read and written, and what is done about
// elements that point nowhere.
//
// The host checks them on the CPU. Those of a CUDA device it cannot read without waiting, so
// kernels check them: a sequence with an entry out of range counts as empty, a page or row that
// does not exist is neither read nor written, and the next call on the device raises an error.
#pragma once

#include <cstdint>

namespace flash {

enum class IndexTensor : int {
  kCuSeqlensQ,
  kCuSeqlensK,
  kSequsedK,
  kCacheSeqlens,
  kLeftpadK,
  kCacheLeftpad,
  kCacheBatchIdx,
  kBlockTable,
  kLabels,
  kSeqlenOffsets,
  kCuSeqlens,
  kX0Subset,
  kOutSubset,
};
inline constexpr int kIndexTensors = 13;

// By the values of IndexTensor.
inline constexpr const char* kIndexTensorNames[kIndexTensors] = {
    "cu_seqlens_q",  "cu_seqlens_k",    "seqused_k",   "cache_seqlens", "leftpad_k",
    "cache_leftpad", "cache_batch_idx", "block_table", "labels",        "seqlen_offsets",
    "cu_seqlens",    "x0_subset",       "out_subset"};

// What a kernel holds index tensors to beside the tensors' extents.
struct IndexBounds {
  int max_cached;    // rows of a sequence's cache in use before appending
  uint32_t* faults;  // [kIndexTensors], not 0: the tensor had an element out of range
};

}  // namespace flash
