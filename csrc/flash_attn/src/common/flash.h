// Checked arguments, as kernels take them. Filled by the checks in api/ and by nothing else;
// strides are in elements.
//
// They come in parts. A kernel takes those that it uses: a base class of the whole, copied into the
// parameters of a CUDA kernel (which hold at most 4 KB), or referred to on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/dtype.h"
#include "base/target.h"
#include "flash_attn/flash_attn.h"

namespace flash {

// A [batch, row, head, dim] operand with unit stride in dim. In varlen calls batch_stride is 0 and
// rows count from the start of the whole packed tensor.
struct Operand {
  void* ptr = nullptr;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
};

// Additive bias or its gradient, [b, h, sq, sk]; a broadcast dimension has stride 0.
struct Bias {
  void* ptr = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, col_stride = 0;
  int64_t b = 1, h = 1, rows = 1, cols = 1;  // its own extents: 1 where broadcast
};

struct Operands {
  Operand q;  // [b, sq, h, d]
  Operand k;  // [b, sk, hk, d], or pages [num_pages, page_size, hk, d]: batch_stride is then the
              // page stride
  Operand v;  // as k with dv
  Operand o;  // [b, sq, h, dv]
  // Element (b, h, i) at b * lse_batch_stride + h * lse_head_stride + i (i: packed row); null: not
  // wanted.
  float* softmax_lse = nullptr;
  int64_t lse_batch_stride = 0, lse_head_stride = 0;
  Dtype dtype = Dtype::kFloat32;  // of q; QuantizationParams has those of k, v and o
  int64_t b = 0, h = 0, h_k = 0;
  int64_t d = 0, d_v = 0;
};

// Where each sequence lies. Dense: cu_seqlens_* are null.
struct SequenceGeometry {
  int64_t seqlen_q = 0, seqlen_k = 0;  // dense: exact; varlen: the largest over the batch
  int64_t total_q = 0, total_k = 0;    // varlen: rows of q and k; dense: b * seqlen
  int64_t seqlen_knew = 0;  // rows appended to each sequence's keys; seqused_k counts those before
  const int32_t* cu_seqlens_q = nullptr;  // [b + 1]
  const int32_t* cu_seqlens_k = nullptr;  // [b + 1]; with block_table only its differences are used
  const int32_t* seqused_k = nullptr;     // [b]: number of keys, overrides the lengths above
  const int32_t* leftpad_k = nullptr;     // [b]
  const int32_t* cache_batch_idx = nullptr;  // [b]
  const int32_t* block_table = nullptr;      // [b, *]
  int64_t block_table_batch_stride = 0;
  int64_t page_size = 0;
  int64_t max_pages = 0;  // of a sequence: columns of block_table
  int64_t k_entries =
      0;  // first extent of k and v: batch entries, pages, or rows of a packed batch
};

// From products of q and k to the weights of v.
struct ScoreParams {
  float scale_softmax = 1.f;
  float softcap = 0.f;                          // 0: off
  int64_t window_left = -1, window_right = -1;  // -1: no limit; causal is already window_right = 0
  const float* alibi_slopes = nullptr;          // [h] or [b, h]
  int64_t alibi_batch_stride = 0;               // 0 for [h]
  const void* s_aux = nullptr;                  // [h]
  Dtype s_aux_dtype = Dtype::kFloat32;
  int64_t s_aux_stride = 1;
  Bias bias;  // ptr == nullptr: none
};

struct DropoutParams {
  float p_dropout = 0.f;  // probability to drop
  uint64_t seed = 0, offset = 0;
  void* s_dmask = nullptr;  // [b, h, sq_rounded, sk_rounded], dtype of o, contiguous
  int64_t seqlen_q_rounded = 0, seqlen_k_rounded = 0;
};

// What is appended to a KV cache before attention (mha_fwd_kvcache): seqlen_knew rows.
struct AppendParams {
  Operand knew, vnew;  // [b, seqlen_knew, hk, d | dv]; ptr == nullptr: nothing to append
  const void *rotary_cos = nullptr, *rotary_sin = nullptr;  // [*, rotary_dim / 2], dtype of q
  int64_t rotary_cos_row_stride = 0, rotary_sin_row_stride = 0;
  int64_t rotary_dim = 0;
  int64_t rotary_rows = 0;  // of the tables
  bool is_rotary_interleaved = false;
};

// Factors of an operand's numbers: row i of a sequence (of q, or of the keys of a cache entry
// before left padding) and key-value head hk of batch entry b has
//
//   ptr[b * batch_stride + hk * head_stride + i / kDescaleRows * block_stride]
//
// block_stride is 0 where all rows of a head share a factor. ptr == nullptr: 1.
inline constexpr int kDescaleRows = 128;
struct Descale {
  const float* ptr = nullptr;
  int64_t batch_stride = 0, head_stride = 0, block_stride = 0;
};

// Of operands in fp8, which may differ in dtype from what goes with them.
struct QuantizationParams {
  Dtype kv_dtype = Dtype::kFloat32;  // of k, v, knew, vnew: that of q, or fp8
  Dtype o_dtype = Dtype::kFloat32;   // that of q, unless q is fp8
  Descale q_descale, k_descale, v_descale;
};

struct GradientParams {
  Operand dout;                 // as o
  Operand dq, dk, dv;           // as q, k, v
  const float* dlse = nullptr;  // strides below
  int64_t dlse_batch_stride = 0, dlse_head_stride = 0, dlse_row_stride = 1;
  float* dsoftmax_sum = nullptr;  // softmax_d: (b, h, i) at b * batch_stride + h * head_stride + i
  int64_t dsoftmax_batch_stride = 0,
          dsoftmax_head_stride = 0;  // varlen: sequence s starts at cu_seqlens_q[s] + 128 s
  float* ds_aux = nullptr;           // [h]
  Bias dbias;                        // fp32; ptr == nullptr: not wanted
};

// What forward and backward share.
struct Attention_params : Operands,
                          SequenceGeometry,
                          ScoreParams,
                          DropoutParams,
                          QuantizationParams {
  Target target;
  Workspace workspace;
};

struct Flash_fwd_params : Attention_params, AppendParams {
  int64_t num_splits = 0;  // 0: by the sequence's own length
};

struct Flash_bwd_params : Attention_params, GradientParams {};

struct Combine_params {
  const float *out_partial = nullptr, *lse_partial = nullptr;
  int64_t out_partial_stride[4] = {};  // splits, b, s, h
  int64_t lse_partial_stride[4] = {};  // splits, b, s, h
  int64_t splits = 0, b = 0, s = 0, h = 0, d_v = 0;
  Operand out;  // [b, s, h, dv]
  Dtype out_dtype = Dtype::kFloat32;
  float* lse = nullptr;
  int64_t lse_stride[3] = {};  // b, s, h
  Target target;
};

}  // namespace flash
