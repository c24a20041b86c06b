/* Rotary position embedding (arXiv:2104.09864) in one pass over memory: the C interface.
 *
 * Status, errors and thread safety are those of flash_attn.h. Pair i of a head at position t is
 * turned: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin) with cos[t, i] and sin[t, i],
 * computed in fp32. Pairs are elements i and i + rotary_dim / 2, or interleaved 2 i and 2 i + 1;
 * elements from rotary_dim on stay as they are. The backward is the conjugate.
 *
 * Tensors of heads are fp16, bf16 or fp32, with last stride 1 and any other strides, so that heads
 * of a packed tensor are turned where they lie. An output may be the view that its input is.
 */
#ifndef FLASH_ATTN_ROTARY_H_
#define FLASH_ATTN_ROTARY_H_

#include "flash_attn/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flash_attn_rotary_args {
  const flash_attn_tensor* x;   /* [batch, seqlen, nheads, d]; with cu_seqlens [total, nheads, d] */
  const flash_attn_tensor* out; /* of x's shape and dtype */
  const flash_attn_tensor* cos; /* [seqlen_ro, rotary_dim / 2], rotary_dim <= d, of x's dtype or */
  const flash_attn_tensor* sin; /*   fp32, both alike */
  /* Another tensor that is turned, with its own number of heads; NULL: none */
  const flash_attn_tensor* k;
  const flash_attn_tensor* k_out;
  const flash_attn_tensor* cos_k; /* NULL: cos; of cos's shape and dtype */
  const flash_attn_tensor* sin_k; /* NULL: sin */
  /* Positions of the sequences' first tokens, which must leave all tokens within the tables.
     Entries out of range of a tensor are an error on the CPU; a CUDA kernel leaves the sequence as
     it is and the next call on the device raises an error. So it is with cu_seqlens. */
  const flash_attn_tensor* seqlen_offsets; /* [batch], int32 or int64; NULL: seqlen_offset */
  int64_t seqlen_offset;
  /* Where sequences begin and end: ascends from 0 to at most total. Tokens after the last sequence
     stay as they are. */
  const flash_attn_tensor* cu_seqlens; /* [batch + 1], int32 or int64; NULL: not packed */
  int64_t max_seqlen;                  /* with cu_seqlens: of the longest sequence, or more */
  int32_t interleaved;                 /* bool */
  int32_t conjugate;                   /* bool: turn the other way, which undoes it */
  void* stream;                        /* a CUstream; ignored on the CPU */
} flash_attn_rotary_args;

FLASH_ATTN_API flash_attn_status flash_attn_rotary(const flash_attn_rotary_args* args);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_ROTARY_H_ */
