/* Cross entropy of rows of logits against labels, forward and backward: the C interface.
 *
 * Status, errors and thread safety are those of flash_attn.h. With z = logit_scale * logits:
 *
 *   lse = log(sum_j exp(z_j))
 *   loss = lse - (1 - label_smoothing) z_label - label_smoothing mean_j(z_j)
 *          + lse_square_scale lse^2
 *
 * A row whose label is ignore_index has the loss 0, and its logits are not read. Logits are fp16,
 * bf16 or fp32, with last stride 1 and rows at any distance; arithmetic and all statistics are
 * fp32.
 *
 * The classes of a row may lie in several tensors: chunks of a loop, or shards of several
 * processes. A call sees those from class_start on. What it has to tell of them is a row's state,
 * four fp32 numbers: {max_j z_j, sum_j exp(z_j - max), z_label or 0 if the label is not among them,
 * sum_j (z_j - max)}, where a maximum of -inf counts as 0 in differences. That of an ignored row is
 * {0, 1, 0, 0}.
 *
 * A label that is neither ignore_index nor one of num_classes is an error on the CPU, before
 * anything is written. On CUDA its row counts as ignored, and the next call on the device fails.
 */
#ifndef FLASH_ATTN_XENTROPY_H_
#define FLASH_ATTN_XENTROPY_H_

#include "flash_attn/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct flash_attn_xentropy_fwd_args {
  const flash_attn_tensor* logits; /* [rows, cols] */
  const flash_attn_tensor* labels; /* [rows], int32 or int64, contiguous */
  /* [rows], fp32, contiguous: lse of these logits, which are then read at the label only. With
   * logit_scale 1, label_smoothing 0 and classes_before 0. NULL: computed. */
  const flash_attn_tensor* precomputed_lse;
  double label_smoothing;
  double logit_scale;
  double lse_square_scale;
  int64_t ignore_index;
  int64_t class_start;    /* the class of the first column */
  int64_t num_classes;    /* in all: columns are classes class_start .. class_start + cols - 1 */
  int64_t classes_before; /* that state has seen already; 0: state holds nothing yet */
  const flash_attn_tensor* state; /* [rows, 4], fp32, contiguous, 16-byte aligned: updated */
  /* [rows], fp32, contiguous: the loss with all of num_classes in the state, and the part of it
   * that is lse_square_scale lse^2. Both or neither. */
  const flash_attn_tensor* losses;
  const flash_attn_tensor* z_losses;
  void* stream; /* a CUstream; ignored on the CPU */
} flash_attn_xentropy_fwd_args;

FLASH_ATTN_API flash_attn_status flash_attn_xentropy_fwd(const flash_attn_xentropy_fwd_args* args);

/* dlogits = dloss * logit_scale * (softmax(z)_j (1 + 2 lse_square_scale lse)
 *                                  - (1 - label_smoothing) [j = label]
 *                                  - label_smoothing / num_classes)
 * The lse of a state with precomputed_lse must not be more than 88 below the largest logit. */
typedef struct flash_attn_xentropy_bwd_args {
  const flash_attn_tensor* dlosses; /* [rows], fp32, contiguous */
  const flash_attn_tensor* logits;  /* as in the forward, as are the labels and the numbers */
  const flash_attn_tensor* labels;
  const flash_attn_tensor* state; /* [rows, 4]: with all classes */
  double label_smoothing;
  double logit_scale;
  double lse_square_scale;
  int64_t ignore_index;
  int64_t class_start;
  int64_t num_classes;
  const flash_attn_tensor* dlogits; /* [rows, cols]; may be the logits themselves */
  void* stream;
} flash_attn_xentropy_bwd_args;

FLASH_ATTN_API flash_attn_status flash_attn_xentropy_bwd(const flash_attn_xentropy_bwd_args* args);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_XENTROPY_H_ */
