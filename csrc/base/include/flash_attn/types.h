/* The C types of every library in this repository: status, dtypes, views of the caller's tensors.
 */
#ifndef FLASH_ATTN_TYPES_H_
#define FLASH_ATTN_TYPES_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FLASH_ATTN_API __attribute__((visibility("default")))
#else
#define FLASH_ATTN_API
#endif

#define FLASH_ATTN_MAX_NDIM 5

typedef enum flash_attn_status {
  FLASH_ATTN_OK = 0,
  FLASH_ATTN_INVALID_ARGUMENT = 1, /* an argument breaks this header's contract */
  FLASH_ATTN_UNSUPPORTED = 2,      /* valid, but no kernel of this build or machine does it */
  FLASH_ATTN_OUT_OF_MEMORY = 3,
  FLASH_ATTN_DEVICE_ERROR = 4, /* the device's driver reported an error */
  FLASH_ATTN_INTERNAL_ERROR = 5
} flash_attn_status;

typedef enum flash_attn_dtype {
  FLASH_ATTN_FLOAT16 = 0,
  FLASH_ATTN_BFLOAT16 = 1,
  FLASH_ATTN_FLOAT32 = 2,
  FLASH_ATTN_INT32 = 3,
  FLASH_ATTN_INT64 = 4,
  FLASH_ATTN_OTHER_DTYPE = 5, /* anything else: always rejected with a message */
  FLASH_ATTN_FLOAT8_E4M3 = 6  /* finite numbers and NaN only (torch.float8_e4m3fn) */
} flash_attn_dtype;

typedef enum flash_attn_device_type {
  FLASH_ATTN_CPU = 1,
  FLASH_ATTN_CUDA = 2
} flash_attn_device_type; /* = DLPack */

/* A strided view of the caller's memory. */
typedef struct flash_attn_tensor {
  void* data; /* may be NULL only where some extent is 0 */
  flash_attn_dtype dtype;
  flash_attn_device_type device_type;
  int32_t device_id;
  int32_t ndim;
  int64_t shape[FLASH_ATTN_MAX_NDIM];
  int64_t stride[FLASH_ATTN_MAX_NDIM]; /* in elements */
} flash_attn_tensor;

#endif /* FLASH_ATTN_TYPES_H_ */
