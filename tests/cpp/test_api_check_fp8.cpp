// Calls with fp8 tensors and their factors: what the checks make of them, what they turn down.
#include "api/check.h"
#include "api_calls.h"

namespace flash_test {
namespace {

constexpr flash_attn_dtype kFp8 = FLASH_ATTN_FLOAT8_E4M3;
constexpr int64_t kBlocks = 2;

template <typename C>
void add_descales(C& c) {
  c.args.q_descale = c.add("q_descale", kFp32, {kBatch, kHeadsK});
  c.args.k_descale = c.add("k_descale", kFp32, {kBatch, kHeadsK, kBlocks});
  c.args.v_descale = c.add("v_descale", kFp32, {kBatch, kHeadsK});
}

FwdCall make_fp8_fwd() {
  FwdCall c = make_fwd();
  c["q"].dtype = c["k"].dtype = c["v"].dtype = kFp8;
  add_descales(c);
  return c;
}

FwdCall make_fp8_varlen_fwd() {
  FwdCall c = make_paged_varlen_fwd();
  c["q"].dtype = c["k_pages"].dtype = c["v_pages"].dtype = kFp8;
  add_descales(c);
  return c;
}

// Queries in fp32 over an fp8 cache.
KvcacheCall make_fp8_kvcache() {
  KvcacheCall c = make_paged_kvcache();
  c["k_cache"].dtype = c["v_cache"].dtype = c["k"].dtype = c["v"].dtype = kFp8;
  c.args.rotary_cos = c.args.rotary_sin = nullptr;
  add_descales(c);
  c.args.q_descale = nullptr;
  return c;
}

BwdCall make_fp8_bwd() {
  BwdCall c = make_bwd();
  c["q"].dtype = c["k"].dtype = c["v"].dtype = kFp8;
  return c;
}

TEST(ApiCheckFp8, ValidCallsAreServed) {
  FwdCall dense = make_fp8_fwd(), varlen = make_fp8_varlen_fwd();
  KvcacheCall cache = make_fp8_kvcache();
  EXPECT_EQ(flash_attn_mha_fwd(&dense.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_mha_varlen_fwd(&varlen.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(flash_attn_mha_fwd_kvcache(&cache.args), FLASH_ATTN_OK) << flash_attn_last_error();
}

TEST(ApiCheckFp8, Parameters) {
  FwdCall c = make_fp8_fwd();
  c["q_descale"].stride[0] = c["q_descale"].stride[1] = 0;
  const flash::Flash_fwd_params p = flash::check_mha_fwd(c.args);
  EXPECT_EQ(p.dtype, flash::Dtype::kFloat8E4M3);
  EXPECT_EQ(p.kv_dtype, flash::Dtype::kFloat8E4M3);
  EXPECT_EQ(p.o_dtype, flash::Dtype::kFloat32);
  EXPECT_EQ(p.q_descale.ptr, c["q_descale"].data);
  EXPECT_EQ(p.q_descale.batch_stride, 0);
  EXPECT_EQ(p.q_descale.head_stride, 0);
  EXPECT_EQ(p.k_descale.batch_stride, kHeadsK * kBlocks);
  EXPECT_EQ(p.k_descale.head_stride, kBlocks);
  EXPECT_EQ(p.k_descale.block_stride, 1);
  EXPECT_EQ(p.v_descale.block_stride, 0);

  c["k_descale"].shape[2] = 1;  // one block: all rows are in it
  EXPECT_EQ(flash::check_mha_fwd(c.args).k_descale.block_stride, 0);

  KvcacheCall cache = make_fp8_kvcache();
  const flash::Flash_fwd_params q = flash::check_mha_fwd_kvcache(cache.args);
  EXPECT_EQ(q.dtype, flash::Dtype::kFloat32);
  EXPECT_EQ(q.kv_dtype, flash::Dtype::kFloat8E4M3);
  EXPECT_EQ(q.o_dtype, flash::Dtype::kFloat32);
  EXPECT_EQ(q.q_descale.ptr, nullptr);
}

std::vector<Broken<FwdCall>> broken_in_either_layout() {
  return {
      {"q_descale must have shape (batch_size, num_heads_k) = (2, 2), got (1, 2)",
       [](auto& c) { c["q_descale"].shape[0] = 1; }},
      {"v_descale must have shape (batch_size, num_heads_k) = (2, 2), got (2)",
       [](auto& c) { c["v_descale"].ndim = 1; }},
      {"k_descale must have shape (batch_size, num_heads_k, num_blocks) = (2, 2, 2), got (2, 1, 2)",
       [](auto& c) { c["k_descale"].shape[1] = 1; }},
      {"rows of k: 1, got 0", [](auto& c) { c["k_descale"].shape[2] = 0; }},
      {"q_descale must have dtype fp32, got bf16",
       [](auto& c) { c["q_descale"].dtype = FLASH_ATTN_BFLOAT16; }},
      {"v_descale must be on the same device as q",
       [](auto& c) { c["v_descale"].device_type = FLASH_ATTN_CUDA; }},
      {"k_descale has a negative stride", [](auto& c) { c["k_descale"].stride[2] = -1; }},
      {"k_descale has no data", [](auto& c) { c["k_descale"].data = nullptr; }},
      {"q_descale belongs to fp8 tensors: q has fp32", [](auto& c) { c["q"].dtype = kFp32; }},
      {"Output of fp8 inputs must have dtype fp16, bf16 or fp32: out has fp8",
       [](auto& c) { c["out"].dtype = kFp8; }},
      {"s_dmask of fp8 inputs must have the same dtype as out: s_dmask has fp32",
       [](auto& c) { c["out"].dtype = FLASH_ATTN_BFLOAT16; }},
      {"attn_bias must have the dtype of query or fp32",
       [](auto& c) { c["attn_bias"].dtype = FLASH_ATTN_BFLOAT16; }},
      {"out must not share memory with k_descale",
       [](auto& c) { c["k_descale"].data = c["out"].data; }},
  };
}

TEST(ApiCheckFp8, DenseForwardRejects) {
  expect_rejected<FwdCall>(make_fp8_fwd, flash_attn_mha_fwd, broken_in_either_layout());
  expect_rejected<FwdCall>(make_fp8_fwd, flash_attn_mha_fwd,
                           {
                               {"query and key must have the same dtype: q has fp8, k has fp32",
                                [](auto& c) { c["k"].dtype = kFp32; }},
                               {"key and value must have the same dtype: k has fp8, v has fp32",
                                [](auto& c) { c["v"].dtype = kFp32; }},
                           });
}

TEST(ApiCheckFp8, VarlenForwardRejects) {
  expect_rejected<FwdCall>(make_fp8_varlen_fwd, flash_attn_mha_varlen_fwd,
                           broken_in_either_layout());
  expect_rejected<FwdCall>(
      make_fp8_varlen_fwd, flash_attn_mha_varlen_fwd,
      {{"k_descale must have a factor for each 128 of 300 rows of k: 3, got 2", [](auto& c) {
          c.args.max_seqlen_k = 300;
          c.args.score.attn_bias = nullptr;
        }}});
}

TEST(ApiCheckFp8, KvcacheRejects) {
  expect_rejected<KvcacheCall>(
      make_fp8_kvcache, flash_attn_mha_fwd_kvcache,
      {
          {"Key must have the same dtype as the KV cache: k_cache has fp8, k has fp32",
           [](auto& c) { c["k"].dtype = kFp32; }},
          {"Value must have the same dtype as the KV cache",
           [](auto& c) { c["v"].dtype = FLASH_ATTN_BFLOAT16; }},
          {"rotary embedding (rotary_cos, rotary_sin) does not take fp8 keys",
           [](auto& c) {
             c.args.rotary_cos = &c["rotary_cos"];
             c.args.rotary_sin = &c["rotary_sin"];
           }},
          {"v_descale belongs to fp8 tensors: v has fp32",
           [](auto& c) {
             c["k_cache"].dtype = c["v_cache"].dtype = c["k"].dtype = c["v"].dtype = kFp32;
             c.args.k_descale = nullptr;
           }},
      });
}

TEST(ApiCheckFp8, BackwardRejects) {
  expect_rejected<BwdCall>(
      make_fp8_bwd, flash_attn_mha_bwd,
      {
          {"FlashAttention backward only support fp16, bf16 and fp32 data type: q has fp8",
           [](auto&) {}},
          {"FlashAttention backward only support fp16, bf16 and fp32 data type: k has fp8",
           [](auto& c) { c["q"].dtype = kFp32; }},
      });
}

}  // namespace
}  // namespace flash_test
