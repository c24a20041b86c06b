// Checks every argument of a call, once for all backends, and turns it into what kernels take. A
// call that breaks the contract of flash_attn.h leaves by ApiError before anything has been
// written. Contents of index tensors are checked where the host can read them, on the CPU.
#pragma once

#include "base/tensor.h"
#include "common/flash.h"
#include "flash_attn/flash_attn.h"

namespace flash {

// Entry points.
Flash_fwd_params check_mha_fwd(const flash_attn_fwd_args& args);
Flash_fwd_params check_mha_varlen_fwd(const flash_attn_fwd_args& args);
Flash_bwd_params check_mha_bwd(const flash_attn_bwd_args& args);
Flash_bwd_params check_mha_varlen_bwd(const flash_attn_bwd_args& args);
Flash_fwd_params check_mha_fwd_kvcache(const flash_attn_kvcache_args& args);
Combine_params check_combine(const flash_attn_combine_args& args);

// ---------------------------------------------------------------- parts of the entry points

// How rows are laid out: [batch, row, ...], packed sequences, packed queries over paged keys, a KV
// cache, a paged one.
enum class Layout { kDense, kVarlen, kPagedVarlen, kCache, kPagedCache };

// q, k, v: dtypes, devices, last strides, shapes, head counts. Fills Attention_params, less the
// lengths of varlen and paged batches. `limit` is the sentence for a head dim that no kernel takes.
void check_qkv(const Arg& q, const Arg& k, const Arg& v, Layout layout, const char* limit,
               Attention_params& p);

// [batch, row, head, dim] and [row, head, dim].
Operand batched_operand(const Arg& x);
Operand packed_operand(const Arg& x);

// b * h is small enough to count pieces of work.
void check_batch(const Attention_params& p);
// The score arguments, given the batch's shape in `p`. Masks are normalised: a window that hides
// nothing becomes -1.
void check_score(const flash_attn_score_args& score, const Arg& q, Attention_params& p);
// Dropout's probability, generator state and the returned probabilities. `s_dmask` may be absent.
void check_dropout(double p_dropout, const Arg& rng_state, const Arg& s_dmask, const Arg& q,
                   Attention_params& p);
int64_t check_num_splits(int32_t num_splits);

inline int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

// Factors of fp8 operands, given the batch's shape and the dtypes in `p`.
struct DescaleArgs {
  Arg q, k, v;  // each may be absent
};
template <typename Args>
DescaleArgs descales_of(const Args& args) {
  return {
      {"q_descale", args.q_descale}, {"k_descale", args.k_descale}, {"v_descale", args.v_descale}};
}
void check_descales(const DescaleArgs& descales, const Arg& q, Attention_params& p);

inline bool has_fp8(const Attention_params& p) {
  return p.dtype == Dtype::kFloat8E4M3 || p.kv_dtype == Dtype::kFloat8E4M3;
}

// out, dout: [b, sq, h, dv] or [total_q, h, dv] with unit last stride; the two sentences are those
// of a wrong dtype and of a wrong last stride. Sets p.o_dtype.
Operand check_out_like(const Arg& x, const Arg& q, bool varlen, Attention_params& p,
                       const char* dtype_sentence, const char* stride_sentence);
// softmax_lse: fp32 [b, h, sq] or [h, total_q] with unit last stride.
void check_lse(const Arg& lse, const Arg& q, bool varlen, Attention_params& p);

// cu_seqlens_q and cu_seqlens_k: sets p.b and p.cu_seqlens_*, and p.seqlen_* to the callers'
// limits.
void check_cu_seqlens(const Arg& cu_seqlens_q, const Arg& cu_seqlens_k, int64_t max_seqlen_q,
                      int64_t max_seqlen_k, const Arg& q, Attention_params& p);
// Reads cu_seqlens (and with them seqused_k, leftpad_k, block_table of max_pages columns) and
// lowers p.seqlen_* to the longest sequence.
void check_varlen_contents(const Arg& q, const Arg& k, int64_t max_pages, Attention_params& p);
// Page numbers of one sequence's keys first..last - 1 (`sequence` counts from 0).
void check_pages(const Attention_params& p, int64_t sequence, int64_t first, int64_t last,
                 int64_t num_pages);
// block_table: int32 [b, max_pages_per_sequence]. Returns max_pages_per_sequence.
int64_t check_block_table(const Arg& block_table, const Arg& q, const Arg& k, Attention_params& p);

// Rows are appended (seqlen_knew > 0): nothing that the call reads is changed by it before. Reads
// cache_seqlens and what else tells where they go, on the CPU.
void check_append_aliases(const flash_attn_kvcache_args& args, const Flash_fwd_params& p);

}  // namespace flash
