// Checked arguments, as kernels take them.
#pragma once

#include "base/matrix.h"

namespace flash::rotary {

// Heads of tokens: [batch, seqlen, nheads, d]; packed tokens are a batch of one.
struct Tokens {
  void* ptr;
  int64_t batch_stride, seq_stride, head_stride;  // elements

  FLASH_INLINE char* token(int64_t batch, int64_t t, int element_bytes) const {
    return static_cast<char*>(ptr) + (batch * batch_stride + t * seq_stride) * element_bytes;
  }
};

// What is turned by one pair of tables.
struct Turned {
  Tokens in, out;
  Matrix cos, sin;  // [table_rows, rotary_dim / 2]
  int heads;        // 0: nothing
  bool in_place;
};

// Of int32 or int64.
struct Indices {
  const void* ptr;  // nullptr: not given
  bool is_wide;

  FLASH_INLINE int64_t operator[](int64_t i) const {
    return is_wide ? static_cast<const int64_t*>(ptr)[i] : static_cast<const int32_t*>(ptr)[i];
  }
};

struct Params {
  Dtype dtype, table_dtype;
  int64_t batch, seqlen;  // packed: 1, all tokens
  int head_dim, rotary_dim;
  int64_t table_rows;
  Turned q, k;
  bool interleaved, conjugate;

  // Positions.
  Indices seqlen_offsets;
  int64_t seqlen_offset;  // without the former
  Indices cu_seqlens;
  int64_t max_seqlen, sequences;  // sequences: batch where tokens are not packed
};

}  // namespace flash::rotary
