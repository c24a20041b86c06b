#include "api_calls.h"

namespace flash_test {
namespace {

constexpr int64_t kRotaryDim = 16;

template <typename C>
void add_score(C& c, int64_t bias_rows, int64_t bias_cols) {
  set_score(&c.args.score);
  c.args.score.alibi_slopes = c.add("alibi_slopes", kFp32, {kBatch, kHeads});
  c.args.score.s_aux = c.add("s_aux", FLASH_ATTN_BFLOAT16, {kHeads});
  c.args.score.attn_bias = c.add("attn_bias", kFp32, {kBatch, 1, bias_rows, bias_cols});
  c.args.p_dropout = 0.25;
  c.args.rng_state = c.add("rng_state", FLASH_ATTN_INT64, {2});
}

template <typename C>
void add_cu_seqlens(C& c) {
  c.args.cu_seqlens_q = c.add_int32("cu_seqlens_q", {0, 2, 5});
  c.args.cu_seqlens_k = c.add_int32("cu_seqlens_k", {0, 3, 7});
  c.args.max_seqlen_q = 3;
  c.args.max_seqlen_k = 4;
}

KvcacheCall make_kvcache_around(std::initializer_list<int64_t> k_shape,
                                std::initializer_list<int64_t> v_shape) {
  KvcacheCall c;
  set_score(&c.args.score);
  c.args.score.is_causal = 1;
  c.args.q = c.add("q", kFp32, {kBatch, kSq, kHeads, kRotaryDim});
  c.args.k_cache = c.add_guarded("k_cache", kFp32, k_shape);
  c.args.v_cache = c.add_guarded("v_cache", kFp32, v_shape);
  c.args.k = c.add("k", kFp32, {kBatch, 2, kHeadsK, kRotaryDim});
  c.args.v = c.add("v", kFp32, {kBatch, 2, kHeadsK, kDimV});
  c.args.out = c.add_guarded("out", kFp32, {kBatch, kSq, kHeads, kDimV});
  c.args.softmax_lse = c.add_guarded("softmax_lse", kFp32, {kBatch, kHeads, kSq});
  c.args.cache_seqlens = c.add_int32("cache_seqlens", {3, 4});
  c.args.cache_leftpad = c.add_int32("cache_leftpad", {0, 1});
  c.args.rotary_cos = c.add("rotary_cos", kFp32, {16, kRotaryDim / 2});
  c.args.rotary_sin = c.add("rotary_sin", kFp32, {16, kRotaryDim / 2});
  return c;
}

}  // namespace

FwdCall make_fwd() {
  FwdCall c;
  c.args.q = c.add("q", kFp32, {kBatch, kSq, kHeads, kDim});
  c.args.k = c.add("k", kFp32, {kBatch, kSk, kHeadsK, kDim});
  c.args.v = c.add("v", kFp32, {kBatch, kSk, kHeadsK, kDimV});
  c.args.out = c.add_guarded("out", kFp32, {kBatch, kSq, kHeads, kDimV});
  c.args.softmax_lse = c.add_guarded("softmax_lse", kFp32, {kBatch, kHeads, kSq});
  c.args.s_dmask = c.add_guarded("s_dmask", kFp32, {kBatch, kHeads, 128, 128});
  add_score(c, kSq, kSk);
  return c;
}

FwdCall make_varlen_fwd() {
  FwdCall c;
  c.args.q = c.add("q", kFp32, {kSq, kHeads, kDim});
  c.args.k = c.add("k", kFp32, {kSk, kHeadsK, kDim});
  c.args.v = c.add("v", kFp32, {kSk, kHeadsK, kDimV});
  c.args.out = c.add_guarded("out", kFp32, {kSq, kHeads, kDimV});
  c.args.softmax_lse = c.add_guarded("softmax_lse", kFp32, {kHeads, kSq});
  c.args.s_dmask = c.add_guarded("s_dmask", kFp32, {kBatch, kHeads, 128, 128});
  add_score(c, 3, 4);
  add_cu_seqlens(c);
  c.args.seqused_k = c.add_int32("seqused_k", {3, 2});
  c.args.leftpad_k = c.add_int32("leftpad_k", {0, 1});
  c.args.zero_tensors = 1;
  return c;
}

FwdCall make_paged_varlen_fwd() {
  FwdCall c = make_varlen_fwd();
  c.args.k = c.add("k_pages", kFp32, {5, 2, kHeadsK, kDim});
  c.args.v = c.add("v_pages", kFp32, {5, 2, kHeadsK, kDimV});
  c.args.block_table = c.add("block_table", FLASH_ATTN_INT32, {kBatch, 2});
  const int32_t pages[] = {4, 0, 2, 1};
  std::memcpy(c["block_table"].data, pages, sizeof(pages));
  return c;
}

BwdCall make_bwd() {
  BwdCall c;
  c.args.q = c.add("q", kFp32, {kBatch, kSq, kHeads, kDim});
  c.args.k = c.add("k", kFp32, {kBatch, kSk, kHeadsK, kDim});
  c.args.v = c.add("v", kFp32, {kBatch, kSk, kHeadsK, kDimV});
  c.args.out = c.add("out", kFp32, {kBatch, kSq, kHeads, kDimV});
  c.args.dout = c.add("dout", kFp32, {kBatch, kSq, kHeads, kDimV});
  c.args.softmax_lse = c.add("softmax_lse", kFp32, {kBatch, kHeads, kSq});
  c.args.dlse = c.add("dlse", kFp32, {kBatch, kHeads, kSq});
  c.args.dq = c.add_guarded("dq", kFp32, {kBatch, kSq, kHeads, kDim});
  c.args.dk = c.add_guarded("dk", kFp32, {kBatch, kSk, kHeadsK, kDim});
  c.args.dv = c.add_guarded("dv", kFp32, {kBatch, kSk, kHeadsK, kDimV});
  c.args.softmax_d = c.add_guarded("softmax_d", kFp32, {kBatch, kHeads, 128});
  c.args.ds_aux = c.add_guarded("ds_aux", kFp32, {kHeads});
  c.args.dattn_bias = c.add_guarded("dattn_bias", kFp32, {kBatch, 1, kSq, kSk});
  add_score(c, kSq, kSk);
  return c;
}

BwdCall make_varlen_bwd() {
  BwdCall c;
  c.args.q = c.add("q", kFp32, {kSq, kHeads, kDim});
  c.args.k = c.add("k", kFp32, {kSk, kHeadsK, kDim});
  c.args.v = c.add("v", kFp32, {kSk, kHeadsK, kDimV});
  c.args.out = c.add("out", kFp32, {kSq, kHeads, kDimV});
  c.args.dout = c.add("dout", kFp32, {kSq, kHeads, kDimV});
  c.args.softmax_lse = c.add("softmax_lse", kFp32, {kHeads, kSq});
  c.args.dlse = c.add("dlse", kFp32, {kHeads, kSq});
  c.args.dq = c.add_guarded("dq", kFp32, {kSq, kHeads, kDim});
  c.args.dk = c.add_guarded("dk", kFp32, {kSk, kHeadsK, kDim});
  c.args.dv = c.add_guarded("dv", kFp32, {kSk, kHeadsK, kDimV});
  c.args.softmax_d = c.add_guarded("softmax_d", kFp32, {kHeads, kSq + 128 * kBatch});
  c.args.ds_aux = c.add_guarded("ds_aux", kFp32, {kHeads});
  c.args.dattn_bias = c.add_guarded("dattn_bias", kFp32, {kBatch, 1, 3, 4});
  add_score(c, 3, 4);
  add_cu_seqlens(c);
  return c;
}

KvcacheCall make_kvcache() {
  KvcacheCall c = make_kvcache_around({3, kSk, kHeadsK, kRotaryDim}, {3, kSk, kHeadsK, kDimV});
  c.args.cache_batch_idx = c.add_int32("cache_batch_idx", {2, 0});
  return c;
}

KvcacheCall make_paged_kvcache() {
  KvcacheCall c = make_kvcache_around({8, 2, kHeadsK, kRotaryDim}, {8, 2, kHeadsK, kDimV});
  c.args.block_table = c.add("block_table", FLASH_ATTN_INT32, {kBatch, 3});
  const int32_t pages[] = {7, 0, 2, 1, 3, 5};
  std::memcpy(c["block_table"].data, pages, sizeof(pages));
  return c;
}

CombineCall make_combine() {
  CombineCall c;
  c.args.out_partial = c.add("out_partial", kFp32, {3, kBatch, kSq, kHeads, kDimV});
  c.args.lse_partial = c.add("lse_partial", kFp32, {3, kBatch, kSq, kHeads});
  c.args.out = c.add_guarded("out", FLASH_ATTN_BFLOAT16, {kBatch, kSq, kHeads, kDimV});
  c.args.lse = c.add_guarded("lse", kFp32, {kBatch, kSq, kHeads});
  return c;
}

}  // namespace flash_test
