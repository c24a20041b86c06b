// FLASH_INLINE: a function shared by the CPU's per-ISA units and by CUDA kernels; never emitted on
// its own. FLASH_DEVICE: a function of CUDA kernels alone.
#pragma once

#if defined(__CUDACC__)
#define FLASH_INLINE __host__ __device__ __forceinline__
#define FLASH_DEVICE __device__ __forceinline__
#else
#define FLASH_INLINE __attribute__((always_inline)) inline
#endif
