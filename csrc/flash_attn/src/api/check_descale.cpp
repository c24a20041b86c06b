// Factors of fp8 operands.
#include "api/check.h"

namespace flash {
namespace {

// What a factor belongs to: its name, its dtype and the rows of its longest sequence.
struct Described {
  const char* name;
  Dtype dtype;
  int64_t seqlen;
};

// [b, hk], or [b, hk, blocks] with a factor for each kDescaleRows rows of any sequence.
Descale check_descale(const Arg& x, const Described& of, const Arg& q, const Attention_params& p) {
  if (!x.given()) return {};
  require(of.dtype == Dtype::kFloat8E4M3, x.name, " belongs to fp8 tensors: ", of.name, " has ",
          dtype_name(of.dtype));
  const Dim b{"batch_size", p.b}, h_k{"num_heads_k", p.h_k};
  if (x.t->ndim != 3) {
    check_fp32(x, q, {b, h_k});
    return {static_cast<const float*>(x.t->data), x.stride(0), x.stride(1), 0};
  }
  const int64_t blocks = x.size(2), needed = (of.seqlen + kDescaleRows - 1) / kDescaleRows;
  check_fp32(x, q, {b, h_k, {"num_blocks", blocks}});
  require(blocks >= needed, x.name, " must have a factor for each ", kDescaleRows, " of ",
          of.seqlen, " rows of ", of.name, ": ", needed, ", got ", blocks);
  return {static_cast<const float*>(x.t->data), x.stride(0), x.stride(1),
          blocks > 1 ? x.stride(2) : 0};
}

}  // namespace

void check_descales(const DescaleArgs& descales, const Arg& q, Attention_params& p) {
  p.q_descale = check_descale(descales.q, {"q", p.dtype, p.seqlen_q}, q, p);
  p.k_descale = check_descale(descales.k, {"k", p.kv_dtype, p.seqlen_k}, q, p);
  p.v_descale = check_descale(descales.v, {"v", p.kv_dtype, p.seqlen_k}, q, p);
}

}  // namespace flash
