// q, k, v, and the tensors that share their shapes.
#include <algorithm>
#include <limits>

#include "api/check.h"

namespace flash {
namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

const char* keys_shape(Layout layout) {
  switch (layout) {
    case Layout::kVarlen:
      return "(total_k, num_heads_k, head_size)";
    case Layout::kPagedVarlen:
    case Layout::kPagedCache:
      return "(num_blocks, page_block_size, num_heads_k, head_size)";
    default:
      return "(batch_size, seqlen_k, num_heads_k, head_size)";
  }
}

// Keys and values have q's dtype, or both have fp8.
void check_dtypes(const Arg& q, const Arg& k, const Arg& v, Attention_params& p) {
  constexpr auto kFp8 = FLASH_ATTN_FLOAT8_E4M3;
  p.dtype = q.t->dtype == kFp8
                ? Dtype::kFloat8E4M3
                : check_float_dtype(q, "FlashAttention only support fp16, bf16 and fp32 data type");
  if (k.t->dtype == kFp8) {
    check_dtype_of_q(v, k, "key and value must have the same dtype");
  } else {
    check_dtype_of_q(k, q, "query and key must have the same dtype");
    check_dtype_of_q(v, q, "query and value must have the same dtype");
  }
  p.kv_dtype = static_cast<Dtype>(k.t->dtype);
}

void check_types(const Arg& q, const Arg& k, const Arg& v, Attention_params& p) {
  check_dtypes(q, k, v, p);
  check_device_of_q(q);
  check_device(k, q);
  check_device(v, q);
  for (const Arg* x : {&q, &k, &v}) {
    check_last_stride(*x, "Input tensor must have contiguous last dimension");
  }
}

void check_heads(const Attention_params& p, const char* limit) {
  require(p.d <= FLASH_ATTN_MAX_HEAD_DIM && p.d_v <= FLASH_ATTN_MAX_HEAD_DIM, limit, ", got ",
          std::max(p.d, p.d_v));
  require(p.d > 0 && p.d_v > 0, "head dimension must be positive");
  require(p.h > 0 && p.h_k > 0, "number of heads must be positive");
  require(p.h % p.h_k == 0,
          "Number of heads in key/value must divide number of heads in query: ", p.h_k,
          " does not divide ", p.h);
}

// Lengths, head counts and page numbers are int32 in kernels.
void check_magnitude(const Arg& x) {
  for (int i = 0; i < x.t->ndim; ++i) {
    require(x.size(i) <= kMaxInt32, x.name, " is too large: dimension ", i, " has size ",
            x.size(i));
  }
}

// The extents that q, k and v tell, before they are compared.
void read_extents(const Arg& q, const Arg& k, const Arg& v, Attention_params& p) {
  const int q_ndim = q.t->ndim, k_ndim = k.t->ndim;
  p.h = q.size(q_ndim - 2);
  p.d = q.size(q_ndim - 1);
  p.h_k = k.size(k_ndim - 2);
  p.d_v = v.size(k_ndim - 1);
  if (q_ndim == 3) {
    p.total_q = q.size(0);
  } else {
    p.b = q.size(0);
    p.seqlen_q = q.size(1);
    p.total_q = p.b * p.seqlen_q;
  }
}

void check_dense_shapes(const Arg& k, const Arg& v, Attention_params& p) {
  p.seqlen_k = k.size(1);
  p.total_k = p.b * p.seqlen_k;
  check_extents(
      k,
      {{"batch_size", p.b}, {"seqlen_k", p.seqlen_k}, {"num_heads_k", p.h_k}, {"head_size", p.d}});
  check_extents(v, {{"batch_size", p.b},
                    {"seqlen_k", p.seqlen_k},
                    {"num_heads_k", p.h_k},
                    {"head_size_v", p.d_v}});
}

void check_varlen_shapes(const Arg& k, const Arg& v, Attention_params& p) {
  p.total_k = k.size(0);
  check_extents(k, {{"total_k", p.total_k}, {"num_heads_k", p.h_k}, {"head_size", p.d}});
  check_extents(v, {{"total_k", p.total_k}, {"num_heads_k", p.h_k}, {"head_size_v", p.d_v}});
}

// Both kinds of cache: [b_cache, seqlen_k, hk, d] and pages [num_pages, page_size, hk, d].
void check_cache_shapes(const Arg& k, const Arg& v, const char* outer, const char* inner,
                        Attention_params& p) {
  check_extents(
      k, {{outer, k.size(0)}, {inner, k.size(1)}, {"num_heads_k", p.h_k}, {"head_size", p.d}});
  check_extents(
      v, {{outer, k.size(0)}, {inner, k.size(1)}, {"num_heads_k", p.h_k}, {"head_size_v", p.d_v}});
  p.total_k = k.size(0) * k.size(1);
}

}  // namespace

Operand batched_operand(const Arg& x) { return {x.t->data, x.stride(0), x.stride(1), x.stride(2)}; }

Operand packed_operand(const Arg& x) { return {x.t->data, 0, x.stride(0), x.stride(1)}; }

void check_batch(const Attention_params& p) {
  require(p.b <= kMaxInt32 && p.b * p.h <= kMaxInt32, "batch_size * num_heads is too large: ", p.b,
          " * ", p.h);
}

void check_qkv(const Arg& q, const Arg& k, const Arg& v, Layout layout, const char* limit,
               Attention_params& p) {
  const bool packed_q = layout == Layout::kVarlen || layout == Layout::kPagedVarlen;
  const int q_ndim = packed_q ? 3 : 4;
  const int k_ndim = layout == Layout::kVarlen ? 3 : 4;
  check_view(q, q_ndim,
             packed_q ? "(total_q, num_heads, head_size)"
                      : "(batch_size, seqlen_q, num_heads, head_size)");
  for (const Arg* x : {&k, &v}) {
    check_view(*x, k_ndim, keys_shape(layout));
  }
  check_types(q, k, v, p);
  check_magnitude(q);
  check_magnitude(k);
  read_extents(q, k, v, p);
  check_heads(p, limit);
  if (!packed_q) check_batch(p);
  switch (layout) {
    case Layout::kDense:
      check_dense_shapes(k, v, p);
      break;
    case Layout::kVarlen:
      check_varlen_shapes(k, v, p);
      break;
    case Layout::kPagedVarlen:
    case Layout::kPagedCache:
      check_cache_shapes(k, v, "num_blocks", "page_block_size", p);
      break;
    case Layout::kCache:
      check_cache_shapes(k, v, "batch_size_c", "seqlen_k", p);
      break;
  }
  p.k_entries = k.size(0);
  p.q = packed_q ? packed_operand(q) : batched_operand(q);
  p.k = layout == Layout::kVarlen ? packed_operand(k) : batched_operand(k);
  p.v = layout == Layout::kVarlen ? packed_operand(v) : batched_operand(v);
}

Operand check_out_like(const Arg& x, const Arg& q, bool varlen, Attention_params& p,
                       const char* dtype_sentence, const char* stride_sentence) {
  require(x.given(), x.name, " must be given");
  if (p.dtype == Dtype::kFloat8E4M3) {
    p.o_dtype = check_float_dtype(x, "Output of fp8 inputs must have dtype fp16, bf16 or fp32");
  } else {
    check_dtype_of_q(x, q, dtype_sentence);
    p.o_dtype = p.dtype;
  }
  check_device(x, q);
  if (varlen) {
    check_shape(x, {{"total_q", p.total_q}, {"num_heads", p.h}, {"head_size_v", p.d_v}});
  } else {
    check_shape(x, {{"batch_size", p.b},
                    {"seqlen_q", p.seqlen_q},
                    {"num_heads", p.h},
                    {"head_size_v", p.d_v}});
  }
  check_last_stride(x, stride_sentence);
  return varlen ? packed_operand(x) : batched_operand(x);
}

void check_lse(const Arg& lse, const Arg& q, bool varlen, Attention_params& p) {
  if (varlen) {
    check_fp32(lse, q, {{"num_heads", p.h}, {"total_q", p.total_q}});
    p.lse_head_stride = lse.stride(0);
  } else {
    check_fp32(lse, q, {{"batch_size", p.b}, {"num_heads", p.h}, {"seqlen_q", p.seqlen_q}});
    p.lse_batch_stride = lse.stride(0);
    p.lse_head_stride = lse.stride(1);
  }
  require(has_contiguous_last_dim(lse), "softmax_lse must have contiguous last dimension");
  p.softmax_lse = static_cast<float*>(lse.t->data);
}

}  // namespace flash
