/* Activation functions in one pass over memory, forward and backward: the C interface.
 *
 * Status, errors and thread safety are those of flash_attn.h. Tensors are fp16, bf16 or fp32, all
 * of one dtype, computed in fp32. Matrices have last stride 1 and rows at any distance: the halves
 * of a gated layer's product are matrices. What a call writes shares no byte with anything else
 * that it reads or writes, but for a result that lies exactly where an input of its shape does.
 */
#ifndef FLASH_ATTN_ACTIVATIONS_H_
#define FLASH_ATTN_ACTIVATIONS_H_

#include "flash_attn/types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum flash_attn_activation {
  FLASH_ATTN_GELU_TANH = 0, /* x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), arXiv:1606.08415 */
  FLASH_ATTN_RELU = 1,      /* max(x, 0) */
  FLASH_ATTN_SQRELU = 2,    /* max(x, 0)^2, arXiv:2109.08668 */
  FLASH_ATTN_SILU = 3,      /* x / (1 + e^-x); with y SwiGLU, arXiv:2002.05202 */
  FLASH_ATTN_SIGMOID = 4    /* 1 / (1 + e^-x); with y the gated linear unit */
} flash_attn_activation;

/* out = f(x + bias) * y */
typedef struct flash_attn_activation_fwd_args {
  const flash_attn_tensor* x;    /* [rows, cols] */
  const flash_attn_tensor* bias; /* [cols], contiguous; NULL: 0 */
  const flash_attn_tensor* y;    /* [rows, cols]; NULL: 1 */
  int32_t activation;            /* flash_attn_activation */
  const flash_attn_tensor* out;  /* [rows, cols] */
  void* stream;                  /* a CUstream; ignored on the CPU */
} flash_attn_activation_fwd_args;

FLASH_ATTN_API flash_attn_status
flash_attn_activation_fwd(const flash_attn_activation_fwd_args* args);

/* dx = dout * y * f'(x + bias), dy = dout * f(x + bias), dbias = sum of dx over rows, in an order
 * that the shape alone decides on each device */
typedef struct flash_attn_activation_bwd_args {
  const flash_attn_tensor* dout; /* [rows, cols] */
  const flash_attn_tensor* x;    /* as in the forward, as are bias, y and activation */
  const flash_attn_tensor* bias;
  const flash_attn_tensor* y;
  int32_t activation;
  const flash_attn_tensor* dx;    /* [rows, cols] */
  const flash_attn_tensor* dy;    /* [rows, cols]; given where y is */
  const flash_attn_tensor* dbias; /* fp32 [cols], contiguous; NULL: not wanted */
  /* CUDA with dbias: device memory for the call, aligned to 16 bytes, of workspace_size or more */
  void* workspace;
  size_t workspace_bytes;
  void* stream;
} flash_attn_activation_bwd_args;

FLASH_ATTN_API flash_attn_status
flash_attn_activation_bwd(const flash_attn_activation_bwd_args* args);

/* The workspace that the call needs; 0 on the CPU. */
FLASH_ATTN_API flash_attn_status
flash_attn_activation_bwd_workspace_size(const flash_attn_activation_bwd_args* args, size_t* bytes);

#ifdef __cplusplus
}
#endif

#endif /* FLASH_ATTN_ACTIVATIONS_H_ */
