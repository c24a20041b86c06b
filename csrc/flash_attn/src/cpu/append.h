// Rotary embedding (RoFormer, arXiv:2104.09864) and appending new keys and values to a KV cache.
#pragma once

#include "base/cpu/parallel.h"
#include "base/cpu/rows.h"
#include "base/cpu/scratch.h"
#include "common/seqlen.h"

namespace flash::cpu::FLASH_ATTN_ISA {

// Rotates the first rotary_dim elements of x by the angles of `position`.
inline void rotate_row(const Flash_fwd_params& p, float* x, int64_t position) {
  const int half = static_cast<int>(p.rotary_dim / 2);
  const int stride = p.is_rotary_interleaved ? 2 : 1;
  const int partner = p.is_rotary_interleaved ? 1 : half;
  const int64_t cos_row = position * p.rotary_cos_row_stride,
                sin_row = position * p.rotary_sin_row_stride;
  for (int i = 0; i < half; ++i) {
    const float c = load_scalar(p.rotary_cos, p.dtype, cos_row + i);
    const float s = load_scalar(p.rotary_sin, p.dtype, sin_row + i);
    const float x0 = x[i * stride], x1 = x[i * stride + partner];
    x[i * stride] = x0 * c - x1 * s;
    x[i * stride + partner] = x0 * s + x1 * c;
  }
}

// knew (rotated) and vnew into the caches, behind the rows in use. They may lie there already.
inline void append_kv(const Flash_fwd_params& p) {
  const int64_t tokens = p.b * p.seqlen_knew;
  const int64_t d_pad = (p.d + kWidth - 1) / kWidth * kWidth;
  const int threads = threads_for(8.0 * tokens * p.h_k * static_cast<double>(p.d + p.d_v));
  Scratch scratch(threads * d_pad * sizeof(float));
  parallel_for(tokens, threads, [&](int64_t i, int thread) {
    const int batch = static_cast<int>(i / p.seqlen_knew);
    const int64_t token = i % p.seqlen_knew;
    const Sequence seq = sequence(p, batch);
    float* row = reinterpret_cast<float*>(scratch.data()) + thread * d_pad;
    for (int64_t h = 0; h < p.h_k; ++h) {
      const int64_t position = seq.cached + token;
      char* k = cache_row(p, p.k, seq, position, h);
      const char* knew = operand_row(p.knew, p.kv_dtype, batch, token, h);
      if (p.rotary_dim > 0) {
        read_row(p.kv_dtype, row, knew, static_cast<int>(p.d), static_cast<int>(d_pad));
        rotate_row(p, row, position);
        write_row(p.kv_dtype, k, row, static_cast<int>(p.d));
      } else {
        std::memmove(k, knew, p.d * dtype_bytes(p.kv_dtype));
      }
      std::memmove(cache_row(p, p.v, seq, position, h),
                   operand_row(p.vnew, p.kv_dtype, batch, token, h),
                   p.d_v * dtype_bytes(p.kv_dtype));
    }
  });
}

}  // namespace flash::cpu::FLASH_ATTN_ISA
