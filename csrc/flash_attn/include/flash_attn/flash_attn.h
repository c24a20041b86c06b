/* Exact attention, forward and backward: the C interface of libflash_attn.
 *
 * Algorithms: FlashAttention (arXiv:2205.14135), FlashAttention-2 (arXiv:2307.08691); dropout uses
 * Philox-4x32-7 (Salmon et al., SC'11, doi:10.1145/2063384.2063405).
 *
 * Every call returns a flash_attn_status; on failure flash_attn_last_error() holds one sentence,
 * and nothing has been written: outputs and caches are as they were. Calls are thread safe. No call
 * keeps a pointer after it returns (on a CUDA stream: after the work it enqueued has run).
 *
 * What a call writes shares no byte with anything else that it reads or writes; tensors may
 * interleave, as the parts of a packed one do. Appending to a KV cache writes the appended rows
 * alone, and new rows may be those places already. A call with b = 0 writes what belongs to no
 * sequence, if anything.
 *
 * Notation: b batch, sq / sk sequence length of queries / keys, h query heads, hk key-value heads
 * (h % hk == 0: query head i reads key-value head i / (h / hk)), d head dim of q and k, dv head dim
 * of v and out, total_q / total_k the number of tokens of all sequences of a packed ("varlen")
 * batch.
 */
#ifndef FLASH_ATTN_FLASH_ATTN_H_
#define FLASH_ATTN_FLASH_ATTN_H_

#include "flash_attn/types.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FLASH_ATTN_MAX_HEAD_DIM 576
#define FLASH_ATTN_MAX_SPLITS 128

/* What the softmax sees: x = softcap(softmax_scale * q.k) - alibi + attn_bias, masked to the
 * visible keys. Key j is visible to query i of a sequence with lengths sq, sk iff
 *
 *   i + sk - sq - window_left <= j <= i + sk - sq + window_right
 *
 * (-1: no limit; causal sets window_right = 0): masks are aligned to the bottom right corner. A
 * query that sees no key yields out = 0 and softmax_lse = +inf (with an attention sink: softmax_lse
 * = s_aux). */
typedef struct flash_attn_score_args {
  double softmax_scale;
  double softcap;       /* > 0: x <- softcap * tanh(x / softcap); 0: off */
  int64_t window_left;  /* -1: no limit */
  int64_t window_right; /* -1: no limit */
  int32_t is_causal;
  /* fp32 [h] or [b, h]: x -= slope * |i + sk - sq - j|; NULL: none */
  const flash_attn_tensor* alibi_slopes;
  /* fp16/bf16/fp32 [h], "attention sink": a logit with no value, joins the softmax's denominator
     and softmax_lse; NULL: none */
  const flash_attn_tensor* s_aux;
  /* dtype of q or fp32, [b | 1, h | 1, sq | 1, sk | 1] (varlen: max_seqlen_*, indexed within
     each sequence), added to x; NULL: none */
  const flash_attn_tensor* attn_bias;
} flash_attn_score_args;

/* --------------------------------------------------------------------------- forward */
typedef struct flash_attn_fwd_args {
  /* fp16 / bf16 / fp32 / fp8, [b, sq, h, d]; varlen [total_q, h, d]; last stride 1 */
  const flash_attn_tensor* q;
  /* dtype of q or fp8, [b, sk, hk, d]; varlen [total_k, hk, d], or paged [num_pages, page_size, hk,
     d] */
  const flash_attn_tensor* k;
  const flash_attn_tensor* v; /* as k with dv for d */
  /* as q with dv for d, of fp8 q fp16 / bf16 / fp32; written; varlen: rows of no sequence become
     0 */
  const flash_attn_tensor* out;
  /* fp32 [b, h, sq]; varlen [h, total_q]; last stride 1; written; natural log; varlen: -inf in
     columns of no sequence; NULL: not wanted */
  const flash_attn_tensor* softmax_lse;
  flash_attn_score_args score;
  double p_dropout; /* 0 <= p < 1 */
  /* int64 [2] = {seed, offset} in host memory; needed if p_dropout > 0 */
  const flash_attn_tensor* rng_state;
  /* NULL, or dtype of out, [b, h, ceil128(sq), ceil128(sk)] (varlen: max_seqlen_*), contiguous;
     needs p_dropout > 0. Written: exp(x - running row max), sign bit set where dropped; the
     running max is that of key blocks visited from the last to the first. For tests. */
  const flash_attn_tensor* s_dmask;
  /* varlen only; NULL / 0 in mha_fwd */
  const flash_attn_tensor* cu_seqlens_q; /* int32 [b + 1], ascending from 0 */
  /* int32 [b + 1]; paged: its differences are the key lengths */
  const flash_attn_tensor* cu_seqlens_k;
  const flash_attn_tensor* seqused_k; /* int32 [b]: keys used of each sequence; NULL: all */
  /* int32 [b]: keys skipped at each sequence's start; NULL: none */
  const flash_attn_tensor* leftpad_k;
  /* int32 [b, max_pages_per_sequence]: paged k, v; NULL: not paged */
  const flash_attn_tensor* block_table;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  int32_t zero_tensors; /* accepted for compatibility: nothing is ever left uninitialised */
  /* 0: heuristic, fixed by the sequence's own length; 1: no split; n: n splits of the keys */
  int32_t num_splits;
  /* NULL (CPU: allocated inside), or device memory of flash_attn_*_workspace_size bytes */
  void* workspace;
  size_t workspace_bytes;
  void* stream; /* CUstream; ignored on the CPU */
  /* Factors of fp8 q, k, v, which stand for q * q_descale, k * k_descale, v * v_descale: fp32, any
     strides, [b, hk], or [b, hk, >= ceil(s / 128)] with one for each 128 rows of a sequence (s: sq
     or sk, varlen max_seqlen_*; rows of left padding count). Those of q are of the key-value head
     that its head reads. NULL: 1 */
  const flash_attn_tensor *q_descale, *k_descale, *v_descale;
} flash_attn_fwd_args;

FLASH_ATTN_API flash_attn_status flash_attn_mha_fwd(const flash_attn_fwd_args* args);
FLASH_ATTN_API flash_attn_status flash_attn_mha_varlen_fwd(const flash_attn_fwd_args* args);
FLASH_ATTN_API flash_attn_status flash_attn_mha_fwd_workspace_size(const flash_attn_fwd_args* args,
                                                                   size_t* bytes);
FLASH_ATTN_API flash_attn_status
flash_attn_mha_varlen_fwd_workspace_size(const flash_attn_fwd_args* args, size_t* bytes);

/* --------------------------------------------------------------------------- backward */
typedef struct flash_attn_bwd_args {
  /* as in the forward; dout as out */
  const flash_attn_tensor *dout, *q, *k, *v, *out, *softmax_lse;
  /* as q, k, v; written; varlen: rows of no sequence become 0 */
  const flash_attn_tensor *dq, *dk, *dv;
  /* fp32 [b, h, ceil128(sq)]; varlen [h, total_q + 128 b]; written: rowsum(dout * out) - dlse, 0
     beyond the rows; varlen: sequence s starts at column cu_seqlens_q[s] + 128 s */
  const flash_attn_tensor* softmax_d;
  /* fp32, as softmax_lse: gradient flowing into softmax_lse; NULL: none */
  const flash_attn_tensor* dlse;
  const flash_attn_tensor* ds_aux;     /* fp32 [h], written; needed iff score.s_aux is given */
  const flash_attn_tensor* dattn_bias; /* fp32, shape of attn_bias, written; NULL: not wanted */
  flash_attn_score_args score;
  double p_dropout;
  const flash_attn_tensor* rng_state; /* that of the forward */
  int32_t deterministic; /* accepted for compatibility: results are always deterministic */
  /* varlen only */
  const flash_attn_tensor *cu_seqlens_q, *cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  int32_t zero_tensors;
  void* workspace;
  size_t workspace_bytes;
  void* stream;
} flash_attn_bwd_args;

FLASH_ATTN_API flash_attn_status flash_attn_mha_bwd(const flash_attn_bwd_args* args);
FLASH_ATTN_API flash_attn_status flash_attn_mha_varlen_bwd(const flash_attn_bwd_args* args);
FLASH_ATTN_API flash_attn_status flash_attn_mha_bwd_workspace_size(const flash_attn_bwd_args* args,
                                                                   size_t* bytes);
FLASH_ATTN_API flash_attn_status
flash_attn_mha_varlen_bwd_workspace_size(const flash_attn_bwd_args* args, size_t* bytes);

/* --------------------------------------------------------------------------- KV cache */
typedef struct flash_attn_kvcache_args {
  const flash_attn_tensor* q; /* as in the forward, [b, sq, h, d] */
  /* dtype of q or fp8, [b_cache, sk, hk, d], or paged [num_pages, page_size, hk, d]; appended to */
  const flash_attn_tensor* k_cache;
  /* as k_cache with dv for d. It may be a part of k_cache's rows (or the other way round); v is
     then the same part of k, and rotary embedding leaves it alone */
  const flash_attn_tensor* v_cache;
  /* dtype of k_cache, [b, s_new, hk, d], appended at cache_seqlens before attention; NULL: none */
  const flash_attn_tensor* k;
  const flash_attn_tensor* v;           /* [b, s_new, hk, dv] */
  const flash_attn_tensor* out;         /* as in the forward, [b, sq, h, dv], written */
  const flash_attn_tensor* softmax_lse; /* fp32 [b, h, sq], written; NULL: not wanted */
  flash_attn_score_args score;          /* attn_bias must be NULL */
  /* int32 [b]: tokens already in the cache; NULL: the whole cache, no k */
  const flash_attn_tensor* cache_seqlens;
  /* dtype of q, [seqlen_rotary >= sk, rotary_dim / 2]; needs k, not in fp8; NULL: none */
  const flash_attn_tensor* rotary_cos;
  const flash_attn_tensor* rotary_sin; /* as rotary_cos */
  /* int32 [b]: row of the cache of each sequence; NULL: its own index */
  const flash_attn_tensor* cache_batch_idx;
  const flash_attn_tensor* cache_leftpad; /* int32 [b]: first valid index in the cache; NULL: 0 */
  const flash_attn_tensor* block_table;   /* int32 [b, max_pages_per_sequence]; NULL: not paged */
  int32_t is_rotary_interleaved; /* 1: pairs (0, 1), (2, 3), ... (GPT-J); 0: halves (GPT-NeoX) */
  int32_t num_splits;            /* as in the forward */
  void* workspace;
  size_t workspace_bytes;
  void* stream;
  /* as in the forward, s of k_descale and v_descale: all rows of a sequence in the cache, or that
     its pages have room for; they are k's and v's too */
  const flash_attn_tensor *q_descale, *k_descale, *v_descale;
} flash_attn_kvcache_args;

FLASH_ATTN_API flash_attn_status flash_attn_mha_fwd_kvcache(const flash_attn_kvcache_args* args);
FLASH_ATTN_API flash_attn_status
flash_attn_mha_fwd_kvcache_workspace_size(const flash_attn_kvcache_args* args, size_t* bytes);

/* --------------------------------------------------------------------------- combine */
/* Merges attention over disjoint sets of keys: lse = log(sum_s exp(lse_s)),
 * out = sum_s exp(lse_s - lse) out_s. A part with lse = -inf (or +inf, the forward's mark) is
 * empty; if all are, out = 0 and lse = -inf. */
typedef struct flash_attn_combine_args {
  const flash_attn_tensor* out_partial; /* fp32 [splits, b, s, h, dv], last stride 1 */
  const flash_attn_tensor* lse_partial; /* fp32 [splits, b, s, h] */
  const flash_attn_tensor* out;         /* fp16 / bf16 / fp32 [b, s, h, dv], written */
  const flash_attn_tensor* lse;         /* fp32 [b, s, h], written; NULL: not wanted */
  void* stream;
} flash_attn_combine_args;

FLASH_ATTN_API flash_attn_status flash_attn_combine(const flash_attn_combine_args* args);

/* --------------------------------------------------------------------------- about */
/* The sentence of this thread's last failed call; "" before any. Valid until this thread's next
 * call. */
FLASH_ATTN_API const char* flash_attn_last_error(void);
FLASH_ATTN_API const char* flash_attn_version(void); /* "2.8.3.post1" */

/* Instruction sets of the CPU backend, best last: "baseline", "avx2", "avx512", "avx512bf16",
 * "amx". Names are separated by spaces. */
FLASH_ATTN_API const char* flash_attn_cpu_isas(void); /* those this build has and this CPU runs */
/* The one in use; FLASH_ATTENTION_CPU_ISA forces one. NULL, and every call on CPU tensors fails
 * with the same sentence, if FLASH_ATTENTION_CPU_ISA or FLASH_ATTENTION_CPU_FP32_PRODUCTS has a
 * value that it cannot have here. */
FLASH_ATTN_API const char* flash_attn_cpu_isa(void);
FLASH_ATTN_API flash_attn_status
flash_attn_set_cpu_isa(const char* name); /* for the process; NULL: the default */
/* Threads of the CPU backend's next call from this thread (OpenMP's maximum). */
FLASH_ATTN_API int flash_attn_cpu_threads(void);
/* Sends the CPU tensors of this thread's calls to the CUDA kernels on an emulated GPU:
 * `description` is an architecture and options, "sm_80" or "sm_80,mode=late,seed=3"
 * (emulator/README.md); NULL or "": back to the CPU backend. `library`: the emulator, NULL for the
 * libgpu_emulator.so beside this one, where builds with FLASH_ATTN_EMULATOR put and install it.
 * The environment variable FLASH_ATTENTION_EMULATOR holds a description for the whole process. */
FLASH_ATTN_API flash_attn_status flash_attn_use_emulator(const char* description,
                                                         const char* library);
/* Counters of the emulated launches since the last flash_attn_use_emulator: JSON, an object for
 * each kernel; "" without an emulator; NULL if FLASH_ATTENTION_EMULATOR names none. Valid until
 * this thread's next call. */
FLASH_ATTN_API const char* flash_attn_emulator_counters(void);
/* The support table of the documentation: one line a kernel, "backend isa operation dtypes
 * head_dims". */
FLASH_ATTN_API const char* flash_attn_kernels(void);

#ifdef __cplusplus
}
#endif
#endif /* FLASH_ATTN_FLASH_ATTN_H_ */
