// mha_fwd, mha_varlen_fwd, combine.
#include "api/check.h"
#include "api/tensors.h"

namespace flash {
namespace {

constexpr char kHeadDimLimit[] = "FlashAttention forward only supports head dimension at most 576";

// What follows q, k, v and the batch's shape, in both layouts.
void check_fwd_rest(const flash_attn_fwd_args& args, const Arg& q, bool varlen,
                    Flash_fwd_params& p) {
  check_score(args.score, q, p);
  check_descales(descales_of(args), q, p);
  const Arg out{"out", args.out}, lse{"softmax_lse", args.softmax_lse},
      s_dmask{"s_dmask", args.s_dmask}, rng_state{"rng_state", args.rng_state};
  p.o = check_out_like(out, q, varlen, p, "Output must have the same dtype as inputs",
                       "Output tensor must have contiguous last dimension");
  if (lse.given()) check_lse(lse, q, varlen, p);
  check_dropout(args.p_dropout, rng_state, s_dmask, q, p);
  p.num_splits = check_num_splits(args.num_splits);
  check_no_self_overlap(out);
  if (lse.given()) check_no_self_overlap(lse);
  check_distinct(written_by(args), read_by(args));
}

}  // namespace

Flash_fwd_params check_mha_fwd(const flash_attn_fwd_args& args) {
  Flash_fwd_params p;
  const Arg q{"q", args.q}, k{"k", args.k}, v{"v", args.v};
  for (const Arg& x : {Arg{"cu_seqlens_q", args.cu_seqlens_q},
                       Arg{"cu_seqlens_k", args.cu_seqlens_k}, Arg{"seqused_k", args.seqused_k},
                       Arg{"leftpad_k", args.leftpad_k}, Arg{"block_table", args.block_table}}) {
    require(!x.given(), x.name, " is an argument of mha_varlen_fwd, not of mha_fwd");
  }
  check_qkv(q, k, v, Layout::kDense, kHeadDimLimit, p);
  check_fwd_rest(args, q, false, p);
  return p;
}

Flash_fwd_params check_mha_varlen_fwd(const flash_attn_fwd_args& args) {
  Flash_fwd_params p;
  const Arg q{"q", args.q}, k{"k", args.k}, v{"v", args.v};
  const Arg block_table{"block_table", args.block_table};
  const bool paged = block_table.given();
  check_qkv(q, k, v, paged ? Layout::kPagedVarlen : Layout::kVarlen, kHeadDimLimit, p);
  check_cu_seqlens({"cu_seqlens_q", args.cu_seqlens_q}, {"cu_seqlens_k", args.cu_seqlens_k},
                   args.max_seqlen_q, args.max_seqlen_k, q, p);
  p.seqused_k = check_per_sequence({"seqused_k", args.seqused_k}, q, p.b);
  p.leftpad_k = check_per_sequence({"leftpad_k", args.leftpad_k}, q, p.b);
  const int64_t max_pages = paged ? check_block_table(block_table, q, k, p) : 0;
  check_fwd_rest(args, q, true, p);
  if (q.t->device_type == FLASH_ATTN_CPU) check_varlen_contents(q, k, max_pages, p);
  return p;
}

Combine_params check_combine(const flash_attn_combine_args& args) {
  Combine_params p;
  const Arg partial{"out_partial", args.out_partial}, lse_partial{"lse_partial", args.lse_partial},
      out{"out", args.out}, lse{"lse", args.lse};
  check_view(partial, 5, "(num_splits, batch_size, seqlen, num_heads, head_size)");
  check_device_of_q(partial);
  p.splits = partial.size(0);
  p.b = partial.size(1);
  p.s = partial.size(2);
  p.h = partial.size(3);
  p.d_v = partial.size(4);
  require(p.splits > 0, "num_splits must be positive");
  require(p.d_v > 0 && p.d_v <= FLASH_ATTN_MAX_HEAD_DIM,
          "FlashAttention combine only supports head dimension at most 576");
  const Dim splits{"num_splits", p.splits}, b{"batch_size", p.b}, s{"seqlen", p.s},
      h{"num_heads", p.h}, d_v{"head_size", p.d_v};
  check_fp32(partial, partial, {splits, b, s, h, d_v});
  require(has_contiguous_last_dim(partial), "out_partial must have contiguous last dimension");
  check_fp32(lse_partial, partial, {splits, b, s, h});
  require(out.given(), "out must be given");
  p.out_dtype = check_float_dtype(out, "out must have dtype fp16, bf16 or fp32");
  check_device(out, partial);
  check_shape(out, {b, s, h, d_v});
  require(has_contiguous_last_dim(out), "Output tensor must have contiguous last dimension");
  check_no_self_overlap(out);
  if (lse.given()) {
    check_fp32(lse, partial, {b, s, h});
    check_no_self_overlap(lse);
    p.lse = static_cast<float*>(lse.t->data);
    for (int i = 0; i < 3; ++i) p.lse_stride[i] = lse.stride(i);
  }
  check_distinct(written_by(args), read_by(args));
  p.out_partial = static_cast<const float*>(partial.t->data);
  p.lse_partial = static_cast<const float*>(lse_partial.t->data);
  for (int i = 0; i < 4; ++i) {
    p.out_partial_stride[i] = partial.stride(i);
    p.lse_partial_stride[i] = lse_partial.stride(i);
  }
  p.out = batched_operand(out);
  return p;
}

}  // namespace flash
