// What the softmax sees: scale, softcap, window, ALiBi, sinks, bias, dropout.
#include <algorithm>
#include <cmath>
#include <limits>

#include "api/check.h"

namespace flash {
namespace {

void check_window(const flash_attn_score_args& score, Attention_params& p) {
  int64_t left = std::max<int64_t>(score.window_left, -1);
  int64_t right = std::max<int64_t>(score.window_right, -1);
  // One query sees every key under a causal mask: it is the last row.
  const bool mask_is_empty =
      p.seqlen_q == 1 && score.alibi_slopes == nullptr && score.attn_bias == nullptr;
  if (score.is_causal && !mask_is_empty) right = 0;
  // The mask is aligned to the bottom right, so the last row limits the left side and the first row
  // the right side.
  if (left >= p.seqlen_k) left = -1;
  if (right >= std::max(p.seqlen_q, p.seqlen_k)) right = -1;
  p.window_left = left;
  p.window_right = right;
}

void check_alibi(const Arg& slopes, const Arg& q, Attention_params& p) {
  if (!slopes.given()) return;
  check_dtype(slopes, FLASH_ATTN_FLOAT32, "ALiBi slopes must have dtype fp32");
  check_device(slopes, q);
  if (slopes.t->ndim == 2) {
    check_shape(slopes, {{"batch_size", p.b}, {"num_heads", p.h}});
    p.alibi_batch_stride = slopes.stride(0);
  } else {
    check_shape(slopes, {{"num_heads", p.h}});
  }
  check_last_stride(slopes, "ALiBi slopes tensor must have contiguous last dimension");
  p.alibi_slopes = static_cast<const float*>(slopes.t->data);
}

void check_s_aux(const Arg& s_aux, const Arg& q, Attention_params& p) {
  if (!s_aux.given()) return;
  p.s_aux_dtype = check_float_dtype(s_aux, "s_aux must have dtype fp16, bf16 or fp32");
  check_device(s_aux, q);
  check_shape(s_aux, {{"num_heads", p.h}});
  p.s_aux = s_aux.t->data;
  p.s_aux_stride = s_aux.stride(0);
}

void check_bias(const Arg& bias, const Arg& q, Attention_params& p) {
  if (!bias.given()) return;
  constexpr char kBiasDtype[] = "attn_bias must have the dtype of query or fp32";
  const Dtype dtype = check_float_dtype(bias, kBiasDtype);
  if (dtype != Dtype::kFloat32) check_dtype_of_q(bias, q, kBiasDtype);
  check_device(bias, q);
  check_view(bias, 4, "(batch_size or 1, num_heads or 1, seqlen_q or 1, seqlen_k or 1)");
  const int64_t full[4] = {p.b, p.h, p.seqlen_q, p.seqlen_k};
  int64_t stride[4];
  for (int i = 0; i < 4; ++i) {
    require(bias.size(i) == 1 || bias.size(i) == full[i],
            "attn_bias must be broadcastable to (batch_size, num_heads, seqlen_q, seqlen_k) = (",
            full[0], ", ", full[1], ", ", full[2], ", ", full[3], "), but dimension ", i,
            " has size ", bias.size(i));
    stride[i] = bias.size(i) == 1 ? 0 : bias.stride(i);
  }
  p.bias = {bias.t->data, dtype,        stride[0],    stride[1],    stride[2],
            stride[3],    bias.size(0), bias.size(1), bias.size(2), bias.size(3)};
}

bool fits_float(double x) { return std::isfinite(x) && std::isfinite(static_cast<float>(x)); }

}  // namespace

void check_score(const flash_attn_score_args& score, const Arg& q, Attention_params& p) {
  require(fits_float(score.softmax_scale), "softmax_scale must be finite, got ",
          score.softmax_scale);
  require(fits_float(score.softcap), "softcap must be finite, got ", score.softcap);
  p.scale_softmax = static_cast<float>(score.softmax_scale);
  p.softcap = std::max(static_cast<float>(score.softcap), 0.f);
  check_window(score, p);
  check_alibi({"alibi_slopes", score.alibi_slopes}, q, p);
  check_s_aux({"s_aux", score.s_aux}, q, p);
  check_bias({"attn_bias", score.attn_bias}, q, p);
}

void check_dropout(double p_dropout, const Arg& rng_state, const Arg& s_dmask, const Arg& q,
                   Attention_params& p) {
  p.p_dropout = static_cast<float>(p_dropout);
  require(p.p_dropout >= 0.f && p.p_dropout < 1.f,
          "dropout_p (p_dropout) must be at least 0 and below 1, got ", p_dropout);
  p.seqlen_q_rounded = round_up(p.seqlen_q, 128);
  p.seqlen_k_rounded = round_up(p.seqlen_k, 128);
  require(!s_dmask.given() || p.p_dropout > 0.f,
          "return_softmax is only supported when p_dropout > 0.0");
  if (p.p_dropout == 0.f) return;

  require(rng_state.given(), "rng_state must be given when p_dropout > 0.0");
  check_dtype(rng_state, FLASH_ATTN_INT64, "rng_state must have dtype int64");
  require(rng_state.t->device_type == FLASH_ATTN_CPU, "rng_state must be on the CPU");
  check_shape(rng_state, {{"2", 2}});
  require(is_contiguous(rng_state), "rng_state must be contiguous");
  const int64_t* state = static_cast<const int64_t*>(rng_state.t->data);
  p.seed = static_cast<uint64_t>(state[0]);
  p.offset = static_cast<uint64_t>(state[1]);

  if (!s_dmask.given()) return;
  if (p.o_dtype == p.dtype)
    check_dtype_of_q(s_dmask, q, "s_dmask must have the same dtype as query");
  else
    check_dtype(s_dmask, static_cast<flash_attn_dtype>(p.o_dtype),
                "s_dmask of fp8 inputs must have the same dtype as out");
  check_device(s_dmask, q);
  check_shape(s_dmask, {{"batch_size", p.b},
                        {"num_heads", p.h},
                        {"seqlen_q_rounded", p.seqlen_q_rounded},
                        {"seqlen_k_rounded", p.seqlen_k_rounded}});
  require(is_contiguous(s_dmask), "s_dmask must be contiguous");
  p.s_dmask = s_dmask.t->data;
}

int64_t check_num_splits(int32_t num_splits) {
  require(num_splits <= FLASH_ATTN_MAX_SPLITS, "num_splits > 128 not supported, got ", num_splits);
  require(num_splits >= 0, "num_splits must not be negative, got ", num_splits);
  return num_splits;
}

}  // namespace flash
