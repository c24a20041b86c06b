/* Layer norm and RMS norm of a sum of branches, in one pass over memory, forward and backward: the
 * C interface.
 *
 *   x = dropout(x0) * rowscale * colscale + dropout(x1) + residual
 *   out = norm(x) * weight + bias, out1 = norm(x) * weight1 + bias1
 *   norm(x) = (x - mean(x)) / sqrt(variance(x) + epsilon)   (arXiv:1607.06450), or
 *             x / sqrt(mean(x^2) + epsilon)                 (RMS norm, arXiv:1910.07467)
 *
 * Status, errors and thread safety are those of flash_attn.h. Each tensor is fp16, bf16 or fp32 on
 * its own account; arithmetic is fp32. Matrices have last stride 1 and rows at any distance;
 * vectors are contiguous. What a call writes shares no byte with anything else that it reads or
 * writes, but for a result that lies exactly where an input of its shape does, where no subset is
 * given and no dcolscale wanted.
 *
 * A column of x0 or x1 is kept where its 16 bits of Philox-4x32-7 are below round((1 - p) 65536),
 * and then divided by 1 - p: columns 8 b to 8 b + 7 of row r are the 16 bytes of the counter {b, r,
 * 0 for x0 or 1 for x1, low half of offset} with the key seed xor the high half of offset.
 */
#ifndef FLASH_ATTN_LAYER_NORM_H_
#define FLASH_ATTN_LAYER_NORM_H_

#include "flash_attn/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What forward and backward are told alike. Absent factors are 1, absent summands 0. */
typedef struct flash_attn_norm_args {
  const flash_attn_tensor* rowscale; /* [rows] */
  double rowscale_const;             /* a factor of x0 too */
  const flash_attn_tensor* colscale; /* [cols] */
  /* int32 [rows]: row of x0 that is a summand of this row of x, counted from 1; 0: none. No row
     twice; what is not named is neither read nor written. NULL: rows 1, 2, ... */
  const flash_attn_tensor* x0_subset;
  const flash_attn_tensor* out_subset;      /* int32 [rows]: as x0_subset, of out and out1 */
  const flash_attn_tensor *weight, *bias;   /* [cols] */
  const flash_attn_tensor *weight1, *bias1; /* [cols] */
  double epsilon;
  double p_dropout;                   /* 0..1 */
  const flash_attn_tensor* rng_state; /* int64 [2] = {seed, offset} on the host; if p_dropout > 0 */
  int32_t is_rms_norm;
  int32_t zero_centered_weight; /* 1 + weight and 1 + weight1 are the factors */
} flash_attn_norm_args;

typedef struct flash_attn_layer_norm_fwd_args {
  const flash_attn_tensor* x0;       /* [x0_rows, cols]; x0_rows = rows without x0_subset */
  const flash_attn_tensor* x1;       /* [rows, cols] */
  const flash_attn_tensor* residual; /* [rows, cols] */
  flash_attn_norm_args norm;
  const flash_attn_tensor* out;  /* [out_rows, cols]; out_rows = rows without out_subset */
  const flash_attn_tensor* out1; /* [out_rows, cols]; NULL: not wanted */
  /* [rows, cols], written; NULL: not wanted. x is rounded to this dtype before it is normed; where
     it is not wanted to that of residual, or of x0. */
  const flash_attn_tensor* x;
  /* int32 [x0_rows, ceil(cols / 4)] and [rows, ceil(cols / 4)], written: a byte a column, 1 where
     x0 or x1 was kept, lower columns in lower bytes; NULL: not wanted */
  const flash_attn_tensor *dropout_mask, *dropout_mask1;
  const flash_attn_tensor* mean; /* fp32 [rows], contiguous, written; NULL: not wanted */
  const flash_attn_tensor* rstd; /* fp32 [rows], contiguous, written; NULL: not wanted */
  void* stream;                  /* a CUstream; ignored on the CPU */
} flash_attn_layer_norm_fwd_args;

FLASH_ATTN_API flash_attn_status
flash_attn_layer_norm_fwd(const flash_attn_layer_norm_fwd_args* args);

/* Gradients: dx of x; dx0, dx1, dresidual of what x is the sum of. Sums over rows are made in an
 * order that depends on the shape alone. */
typedef struct flash_attn_layer_norm_bwd_args {
  const flash_attn_tensor* x;     /* of the forward, as are mean (absent for RMS norm) and rstd */
  const flash_attn_tensor* dout;  /* [out_rows, cols] */
  const flash_attn_tensor* dout1; /* [out_rows, cols]; NULL: 0 */
  const flash_attn_tensor* dx;    /* [rows, cols]: flows into x beside its norm; NULL: 0 */
  const flash_attn_tensor* x0;    /* [x0_rows, cols]; needed where dcolscale is wanted */
  const flash_attn_tensor *mean, *rstd;
  flash_attn_norm_args norm;
  /* written; NULL: not wanted */
  const flash_attn_tensor* dx0;                                             /* [x0_rows, cols] */
  const flash_attn_tensor* dx1;                                             /* [rows, cols] */
  const flash_attn_tensor* dresidual;                                       /* [rows, cols] */
  const flash_attn_tensor *dweight, *dbias, *dweight1, *dbias1, *dcolscale; /* [cols] */
  const flash_attn_tensor* out; /* [out_rows, cols], of the forward once more */
  /* NULL (CPU: allocated inside), or device memory of ..._workspace_size bytes */
  void* workspace;
  size_t workspace_bytes;
  void* stream;
} flash_attn_layer_norm_bwd_args;

FLASH_ATTN_API flash_attn_status
flash_attn_layer_norm_bwd(const flash_attn_layer_norm_bwd_args* args);
FLASH_ATTN_API flash_attn_status
flash_attn_layer_norm_bwd_workspace_size(const flash_attn_layer_norm_bwd_args* args, size_t* bytes);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_LAYER_NORM_H_ */
