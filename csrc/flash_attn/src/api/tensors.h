// The tensors of each call of the C interface, by name: what it writes and what it reads. Absent
// ones are empty regions. Regions are those of checked tensors.
#pragma once

#include <array>

#include "base/tensor.h"
#include "flash_attn/flash_attn.h"

namespace flash {

inline auto written_by(const flash_attn_fwd_args& a) {
  return std::array{Region{"out", a.out}, Region{"softmax_lse", a.softmax_lse},
                    Region{"s_dmask", a.s_dmask}};
}

inline auto read_by(const flash_attn_fwd_args& a) {
  return std::array{Region{"q", a.q},
                    Region{"k", a.k},
                    Region{"v", a.v},
                    Region{"alibi_slopes", a.score.alibi_slopes},
                    Region{"s_aux", a.score.s_aux},
                    Region{"attn_bias", a.score.attn_bias},
                    Region{"rng_state", a.p_dropout > 0. ? a.rng_state : nullptr},
                    Region{"cu_seqlens_q", a.cu_seqlens_q},
                    Region{"cu_seqlens_k", a.cu_seqlens_k},
                    Region{"seqused_k", a.seqused_k},
                    Region{"leftpad_k", a.leftpad_k},
                    Region{"block_table", a.block_table},
                    Region{"q_descale", a.q_descale},
                    Region{"k_descale", a.k_descale},
                    Region{"v_descale", a.v_descale}};
}

inline auto written_by(const flash_attn_bwd_args& a) {
  return std::array{Region{"dq", a.dq},         Region{"dk", a.dk},
                    Region{"dv", a.dv},         Region{"softmax_d", a.softmax_d},
                    Region{"ds_aux", a.ds_aux}, Region{"dattn_bias", a.dattn_bias}};
}

inline auto read_by(const flash_attn_bwd_args& a) {
  return std::array{Region{"dout", a.dout},
                    Region{"q", a.q},
                    Region{"k", a.k},
                    Region{"v", a.v},
                    Region{"out", a.out},
                    Region{"softmax_lse", a.softmax_lse},
                    Region{"dlse", a.dlse},
                    Region{"rng_state", a.p_dropout > 0. ? a.rng_state : nullptr},
                    Region{"alibi_slopes", a.score.alibi_slopes},
                    Region{"s_aux", a.score.s_aux},
                    Region{"attn_bias", a.score.attn_bias},
                    Region{"cu_seqlens_q", a.cu_seqlens_q},
                    Region{"cu_seqlens_k", a.cu_seqlens_k}};
}

// Appended rows are written to the caches too, which read_by lists first: check_append_aliases.
inline auto written_by(const flash_attn_kvcache_args& a) {
  return std::array{Region{"out", a.out}, Region{"softmax_lse", a.softmax_lse}};
}

inline auto read_by(const flash_attn_kvcache_args& a) {
  return std::array{Region{"k_cache", a.k_cache},
                    Region{"v_cache", a.v_cache},
                    Region{"q", a.q},
                    Region{"k", a.k},
                    Region{"v", a.v},
                    Region{"cache_seqlens", a.cache_seqlens},
                    Region{"rotary_cos", a.rotary_cos},
                    Region{"rotary_sin", a.rotary_sin},
                    Region{"cache_batch_idx", a.cache_batch_idx},
                    Region{"cache_leftpad", a.cache_leftpad},
                    Region{"block_table", a.block_table},
                    Region{"alibi_slopes", a.score.alibi_slopes},
                    Region{"s_aux", a.score.s_aux},
                    Region{"q_descale", a.q_descale},
                    Region{"k_descale", a.k_descale},
                    Region{"v_descale", a.v_descale}};
}

inline auto written_by(const flash_attn_combine_args& a) {
  return std::array{Region{"out", a.out}, Region{"lse", a.lse}};
}

inline auto read_by(const flash_attn_combine_args& a) {
  return std::array{Region{"out_partial", a.out_partial}, Region{"lse_partial", a.lse_partial}};
}

}  // namespace flash
