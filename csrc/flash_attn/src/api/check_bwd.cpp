// mha_bwd, mha_varlen_bwd.
#include "api/check.h"
#include "api/tensors.h"

namespace flash {
namespace {

constexpr char kHeadDimLimit[] = "FlashAttention backward only supports head dimension at most 576";

// dq, dk, dv: as their inputs.
Operand check_gradient(const Arg& grad, const Arg& input, const Arg& q, bool varlen) {
  require(grad.given(), grad.name, " must be given");
  if (grad.t->dtype != q.t->dtype) {
    fail(grad.name, " must have the same dtype as q, ", dtype_name(q), ", got ", dtype_name(grad));
  }
  check_device(grad, q);
  if (varlen) {
    check_shape(
        grad,
        {{"total", input.size(0)}, {"num_heads", input.size(1)}, {"head_size", input.size(2)}});
  } else {
    check_shape(grad, {{"batch_size", input.size(0)},
                       {"seqlen", input.size(1)},
                       {"num_heads", input.size(2)},
                       {"head_size", input.size(3)}});
  }
  require(has_contiguous_last_dim(grad), grad.name, " must have contiguous last dimension");
  check_no_self_overlap(grad);
  return varlen ? packed_operand(grad) : batched_operand(grad);
}

void check_softmax_d(const Arg& softmax_d, const Arg& q, bool varlen, Flash_bwd_params& p) {
  if (varlen) {
    check_fp32(softmax_d, q,
               {{"num_heads", p.h}, {"total_q + 128 * batch_size", p.total_q + 128 * p.b}});
    p.dsoftmax_head_stride = softmax_d.stride(0);
  } else {
    check_fp32(
        softmax_d, q,
        {{"batch_size", p.b}, {"num_heads", p.h}, {"seqlen_q_rounded", round_up(p.seqlen_q, 128)}});
    p.dsoftmax_batch_stride = softmax_d.stride(0);
    p.dsoftmax_head_stride = softmax_d.stride(1);
  }
  require(has_contiguous_last_dim(softmax_d), "softmax_d must have contiguous last dimension");
  check_no_self_overlap(softmax_d);
  p.dsoftmax_sum = static_cast<float*>(softmax_d.t->data);
}

void check_dlse(const Arg& dlse, const Arg& q, bool varlen, Flash_bwd_params& p) {
  if (!dlse.given()) return;
  if (varlen) {
    check_fp32(dlse, q, {{"num_heads", p.h}, {"total_q", p.total_q}});
    p.dlse_head_stride = dlse.stride(0);
    p.dlse_row_stride = dlse.stride(1);
  } else {
    check_fp32(dlse, q, {{"batch_size", p.b}, {"num_heads", p.h}, {"seqlen_q", p.seqlen_q}});
    p.dlse_batch_stride = dlse.stride(0);
    p.dlse_head_stride = dlse.stride(1);
    p.dlse_row_stride = dlse.stride(2);
  }
  p.dlse = static_cast<const float*>(dlse.t->data);
}

void check_ds_aux(const Arg& ds_aux, const Arg& q, Flash_bwd_params& p) {
  require(ds_aux.given() == (p.s_aux != nullptr),
          "ds_aux must be given if and only if s_aux is given");
  if (!ds_aux.given()) return;
  check_fp32(ds_aux, q, {{"num_heads", p.h}});
  require(is_contiguous(ds_aux), "ds_aux must be contiguous");
  p.ds_aux = static_cast<float*>(ds_aux.t->data);
}

void check_dbias(const Arg& dbias, const Arg& bias, const Arg& q, Flash_bwd_params& p) {
  if (!dbias.given()) return;
  require(bias.given(), "dattn_bias needs attn_bias");
  check_fp32(dbias, q,
             {{"attn_bias.size(0)", bias.size(0)},
              {"attn_bias.size(1)", bias.size(1)},
              {"attn_bias.size(2)", bias.size(2)},
              {"attn_bias.size(3)", bias.size(3)}});
  check_no_self_overlap(dbias);
  p.dbias = p.bias;
  p.dbias.ptr = dbias.t->data;
  p.dbias.dtype = Dtype::kFloat32;
  int64_t* const strides[4] = {&p.dbias.batch_stride, &p.dbias.head_stride, &p.dbias.row_stride,
                               &p.dbias.col_stride};
  for (int i = 0; i < 4; ++i) *strides[i] = dbias.size(i) == 1 ? 0 : dbias.stride(i);
}

// What follows q, k, v and the batch's shape, in both layouts.
void check_bwd_rest(const flash_attn_bwd_args& args, const Arg& q, bool varlen,
                    Flash_bwd_params& p) {
  require(!has_fp8(p), "FlashAttention backward only support fp16, bf16 and fp32 data type: ",
          p.dtype == Dtype::kFloat8E4M3 ? "q" : "k", " has fp8");
  check_score(args.score, q, p);
  p.o = check_out_like({"out", args.out}, q, varlen, p, "query and out must have the same dtype",
                       "out tensor must have contiguous last dimension");
  p.dout =
      check_out_like({"dout", args.dout}, q, varlen, p, "query and dout must have the same dtype",
                     "dout tensor must have contiguous last dimension");
  check_lse({"softmax_lse", args.softmax_lse}, q, varlen, p);
  check_dropout(args.p_dropout, {"rng_state", args.rng_state}, {"s_dmask", nullptr}, q, p);
  p.dq = check_gradient({"dq", args.dq}, q, q, varlen);
  p.dk = check_gradient({"dk", args.dk}, {"k", args.k}, q, varlen);
  p.dv = check_gradient({"dv", args.dv}, {"v", args.v}, q, varlen);
  check_softmax_d({"softmax_d", args.softmax_d}, q, varlen, p);
  check_dlse({"dlse", args.dlse}, q, varlen, p);
  check_ds_aux({"ds_aux", args.ds_aux}, q, p);
  check_dbias({"dattn_bias", args.dattn_bias}, {"attn_bias", args.score.attn_bias}, q, p);
  check_distinct(written_by(args), read_by(args));
}

}  // namespace

Flash_bwd_params check_mha_bwd(const flash_attn_bwd_args& args) {
  Flash_bwd_params p;
  const Arg q{"q", args.q}, k{"k", args.k}, v{"v", args.v};
  for (const Arg& x :
       {Arg{"cu_seqlens_q", args.cu_seqlens_q}, Arg{"cu_seqlens_k", args.cu_seqlens_k}}) {
    require(!x.given(), x.name, " is an argument of mha_varlen_bwd, not of mha_bwd");
  }
  check_qkv(q, k, v, Layout::kDense, kHeadDimLimit, p);
  check_bwd_rest(args, q, false, p);
  return p;
}

Flash_bwd_params check_mha_varlen_bwd(const flash_attn_bwd_args& args) {
  Flash_bwd_params p;
  const Arg q{"q", args.q}, k{"k", args.k}, v{"v", args.v};
  check_qkv(q, k, v, Layout::kVarlen, kHeadDimLimit, p);
  check_cu_seqlens({"cu_seqlens_q", args.cu_seqlens_q}, {"cu_seqlens_k", args.cu_seqlens_k},
                   args.max_seqlen_q, args.max_seqlen_k, q, p);
  check_bwd_rest(args, q, true, p);
  if (q.t->device_type == FLASH_ATTN_CPU) check_varlen_contents(q, k, 0, p);
  return p;
}

}  // namespace flash
