// Forward, backward and combine: every broken argument is turned down with its sentence, and
// nothing is written.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "api/check.h"
#include "api_calls.h"

namespace flash_test {
namespace {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max() / 4;

std::vector<Broken<FwdCall>> broken_in_either_layout() {
  return {
      {"q must be given", [](auto& c) { c.args.q = nullptr; }},
      {"v must be given", [](auto& c) { c.args.v = nullptr; }},
      {"out must be given", [](auto& c) { c.args.out = nullptr; }},
      {"FlashAttention only support fp16, bf16 and fp32 data type: q has int32",
       [](auto& c) { c["q"].dtype = FLASH_ATTN_INT32; }},
      {"FlashAttention only support fp16, bf16 and fp32 data type",
       [](auto& c) { c["q"].dtype = FLASH_ATTN_OTHER_DTYPE; }},
      {"query and key must have the same dtype",
       [](auto& c) { c["k"].dtype = FLASH_ATTN_FLOAT16; }},
      {"query and value must have the same dtype",
       [](auto& c) { c["v"].dtype = FLASH_ATTN_BFLOAT16; }},
      {"Output must have the same dtype as inputs",
       [](auto& c) { c["out"].dtype = FLASH_ATTN_FLOAT16; }},
      {"softmax_lse must have dtype fp32",
       [](auto& c) { c["softmax_lse"].dtype = FLASH_ATTN_FLOAT16; }},
      {"k must be on the same device as q", [](auto& c) { c["k"].device_type = FLASH_ATTN_CUDA; }},
      {"v must be on CUDA",
       [](auto& c) { c["q"].device_type = c["k"].device_type = FLASH_ATTN_CUDA; }},
      {"q must be on CUDA",
       [](auto& c) {
         std::memset(&c["q"].device_type, 0, 4);
         std::memset(&c["k"].device_type, 0, 4);
         std::memset(&c["v"].device_type, 0, 4);
       }},
      {"out must be on the same device as q",
       [](auto& c) { c["out"].device_type = FLASH_ATTN_CUDA; }},
      {"Input tensor must have contiguous last dimension",
       [](auto& c) { c["k"].stride[c["k"].ndim - 1] = 2; }},
      {"Output tensor must have contiguous last dimension",
       [](auto& c) { c["out"].stride[c["out"].ndim - 1] = 2; }},
      {"q has a negative size", [](auto& c) { c["q"].shape[0] = -1; }},
      {"q has a negative stride", [](auto& c) { c["q"].stride[0] = -1; }},
      {"q is too large", [](auto& c) { c["q"].stride[0] = kHuge; }},
      {"q has no data", [](auto& c) { c["q"].data = nullptr; }},
      {"k is not aligned to its element size",
       [](auto& c) { c["k"].data = static_cast<char*>(c["k"].data) + 1; }},
      {"head dimension must be positive", [](auto& c) { c["q"].shape[c["q"].ndim - 1] = 0; }},
      {"FlashAttention forward only supports head dimension at most 576",
       [](auto& c) { c["q"].shape[c["q"].ndim - 1] = 577; }},
      {"number of heads must be positive", [](auto& c) { c["k"].shape[c["k"].ndim - 2] = 0; }},
      {"Number of heads in key/value must divide number of heads in query",
       [](auto& c) { c["k"].shape[c["k"].ndim - 2] = 3; }},
      {"out must not overlap itself", [](auto& c) { c["out"].stride[0] = 0; }},
      {"softmax_lse must not overlap itself", [](auto& c) { c["softmax_lse"].stride[0] = 0; }},
      {"softmax_lse must have contiguous last dimension",
       [](auto& c) { c["softmax_lse"].stride[c["softmax_lse"].ndim - 1] = 3; }},
      {"out must not share memory with v", [](auto& c) { c["out"].data = c["v"].data; }},
      {"softmax_lse must not share memory with q",
       [](auto& c) { c["softmax_lse"].data = c["q"].data; }},
      {"softmax_scale must be finite", [](auto& c) { c.args.score.softmax_scale = NAN; }},
      {"softmax_scale must be finite", [](auto& c) { c.args.score.softmax_scale = 1e300; }},
      {"softcap must be finite", [](auto& c) { c.args.score.softcap = INFINITY; }},
      {"dropout_p (p_dropout) must be", [](auto& c) { c.args.p_dropout = 1.0; }},
      {"dropout_p (p_dropout) must be", [](auto& c) { c.args.p_dropout = -0.1; }},
      {"dropout_p (p_dropout) must be", [](auto& c) { c.args.p_dropout = NAN; }},
      {"return_softmax is only supported when p_dropout > 0.0",
       [](auto& c) { c.args.p_dropout = 0.0; }},
      {"rng_state must be given", [](auto& c) { c.args.rng_state = nullptr; }},
      {"rng_state must have dtype int64", [](auto& c) { c["rng_state"].dtype = kFp32; }},
      {"rng_state must be on the CPU",
       [](auto& c) { c["rng_state"].device_type = FLASH_ATTN_CUDA; }},
      {"rng_state must have shape (2) = (2), got (3)",
       [](auto& c) { c["rng_state"].shape[0] = 3; }},
      {"s_dmask must have the same dtype as query",
       [](auto& c) { c["s_dmask"].dtype = FLASH_ATTN_FLOAT16; }},
      {"s_dmask must have shape", [](auto& c) { c["s_dmask"].shape[3] = 127; }},
      {"s_dmask must be contiguous", [](auto& c) { c["s_dmask"].stride[2] = 129; }},
      {"ALiBi slopes must have dtype fp32",
       [](auto& c) { c["alibi_slopes"].dtype = FLASH_ATTN_FLOAT16; }},
      {"alibi_slopes must have shape (batch_size, num_heads)",
       [](auto& c) { c["alibi_slopes"].shape[0] = 3; }},
      {"alibi_slopes must have shape (num_heads)", [](auto& c) { c["alibi_slopes"].ndim = 1; }},
      {"ALiBi slopes tensor must have contiguous last dimension",
       [](auto& c) { c["alibi_slopes"].stride[1] = 0; }},
      {"s_aux must have dtype", [](auto& c) { c["s_aux"].dtype = FLASH_ATTN_INT32; }},
      {"s_aux must have shape (num_heads) = (4), got (5)",
       [](auto& c) { c["s_aux"].shape[0] = 5; }},
      {"attn_bias must have the dtype of query or fp32",
       [](auto& c) { c["attn_bias"].dtype = FLASH_ATTN_FLOAT16; }},
      {"attn_bias must have shape", [](auto& c) { c["attn_bias"].ndim = 3; }},
      {"attn_bias must be broadcastable", [](auto& c) { c["attn_bias"].shape[3] = 3; }},
      {"num_splits > 128 not supported", [](auto& c) { c.args.num_splits = 129; }},
      {"num_splits must not be negative", [](auto& c) { c.args.num_splits = -1; }},
  };
}

TEST(ApiCheck, ForwardRejects) {
  expect_rejected<FwdCall>(make_fwd, flash_attn_mha_fwd, broken_in_either_layout());
  expect_rejected<FwdCall>(
      make_fwd, flash_attn_mha_fwd,
      {
          {"q must have shape (batch_size, seqlen_q, num_heads, head_size), got 3 dimensions",
           [](auto& c) { c["q"].ndim = 3; }},
          {"k must have shape", [](auto& c) { c["k"].ndim = 1000; }},
          {"k must have shape", [](auto& c) { c["k"].ndim = -1; }},
          {"k must have shape (batch_size, seqlen_k, num_heads_k, head_size) = (2, 7, 2, 8), got "
           "(3, 7, 2, 8)",
           [](auto& c) { c["k"].shape[0] = 3; }},
          {"v must have shape (batch_size, seqlen_k, num_heads_k, head_size_v) = (2, 7, 2, 6), got "
           "(2, 8, 2, 6)",
           [](auto& c) { c["v"].shape[1] = 8; }},
          {"out must have shape (batch_size, seqlen_q, num_heads, head_size_v) = (2, 5, 4, 6)",
           [](auto& c) { c["out"].shape[3] = 8; }},
          {"softmax_lse must have shape (batch_size, num_heads, seqlen_q) = (2, 4, 5)",
           [](auto& c) { c["softmax_lse"].shape[2] = 6; }},
          {"k must have shape (batch_size, seqlen_k, num_heads_k, head_size) = (0, 7, 2, 8)",
           [](auto& c) { c["q"].shape[0] = 0; }},
          {"too large",
           [](auto& c) {
             c["q"].shape[1] = int64_t{1} << 31;
             c["q"].stride[1] = 0;
           }},
          {"too large",
           [](auto& c) {
             c["q"].shape[0] = kHuge;
             c["q"].stride[0] = 0;
           }},
          {"batch_size * num_heads is too large",
           [](auto& c) {
             c["q"].shape[0] = c["q"].shape[2] = 1 << 20;
             c["q"].shape[1] = 0;
           }},
          {"seqused_k is an argument of mha_varlen_fwd",
           [](auto& c) { c.args.seqused_k = c.add_int32("seqused_k", {1, 1}); }},
      });
}

TEST(ApiCheck, VarlenForwardRejects) {
  expect_rejected<FwdCall>(make_varlen_fwd, flash_attn_mha_varlen_fwd, broken_in_either_layout());
  expect_rejected<FwdCall>(
      make_varlen_fwd, flash_attn_mha_varlen_fwd,
      {
          {"q must have shape (total_q, num_heads, head_size), got 4 dimensions",
           [](auto& c) { c["q"].ndim = 4; }},
          {"cu_seqlens_q must be given", [](auto& c) { c.args.cu_seqlens_q = nullptr; }},
          {"cu_seqlens_k must be given", [](auto& c) { c.args.cu_seqlens_k = nullptr; }},
          {"cu_seqlens_q must have dtype int32",
           [](auto& c) { c["cu_seqlens_q"].dtype = FLASH_ATTN_INT64; }},
          {"cu_seqlens_k must have dtype int32", [](auto& c) { c["cu_seqlens_k"].dtype = kFp32; }},
          {"cu_seqlens_q must have shape", [](auto& c) { c["cu_seqlens_q"].ndim = 2; }},
          {"cu_seqlens_k must have shape (batch_size + 1) = (3), got (2)",
           [](auto& c) { c["cu_seqlens_k"].shape[0] = 2; }},
          {"cu_seqlens_q must be contiguous", [](auto& c) { c["cu_seqlens_q"].stride[0] = 2; }},
          {"cu_seqlens_k must be on the same device as q",
           [](auto& c) { c["cu_seqlens_k"].device_type = FLASH_ATTN_CUDA; }},
          {"cu_seqlens_k must have shape (batch_size + 1) = (1), got (3)",
           [](auto& c) { c["cu_seqlens_q"].shape[0] = 1; }},
          {"cu_seqlens_q must have shape (batch_size + 1) = (1), got (0)",
           [](auto& c) { c["cu_seqlens_q"].shape[0] = 0; }},
          {"cu_seqlens_q must start at 0", [](auto& c) { c.int32("cu_seqlens_q", 0) = 1; }},
          {"cu_seqlens_k must start at 0", [](auto& c) { c.int32("cu_seqlens_k", 0) = -3; }},
          {"cu_seqlens_q must not decrease", [](auto& c) { c.int32("cu_seqlens_q", 1) = 6; }},
          {"cu_seqlens_q must not decrease", [](auto& c) { c.int32("cu_seqlens_q", 1) = -1; }},
          {"cu_seqlens_k ends at 8, beyond the 7 rows of k",
           [](auto& c) { c.int32("cu_seqlens_k", 2) = 8; }},
          {"cu_seqlens_q ends at 2147483647",
           [](auto& c) { c.int32("cu_seqlens_q", 2) = INT32_MAX; }},
          {"cu_seqlens_q holds a sequence of length 4, longer than the max_seqlen of 3",
           [](auto& c) { c.int32("cu_seqlens_q", 1) = 1; }},
          {"max_seqlen_q must not be negative", [](auto& c) { c.args.max_seqlen_q = -1; }},
          {"max_seqlen_k is too large", [](auto& c) { c.args.max_seqlen_k = int64_t{1} << 31; }},
          {"seqused_k must have dtype int32",
           [](auto& c) { c["seqused_k"].dtype = FLASH_ATTN_INT64; }},
          {"seqused_k must have shape (batch_size) = (2), got (1)",
           [](auto& c) { c["seqused_k"].shape[0] = 1; }},
          {"seqused_k[1] = 5 is outside", [](auto& c) { c.int32("seqused_k", 1) = 5; }},
          {"seqused_k[0] = -1 is outside", [](auto& c) { c.int32("seqused_k", 0) = -1; }},
          {"leftpad_k must have dtype int32", [](auto& c) { c["leftpad_k"].dtype = kFp32; }},
          {"leftpad_k[1] = 3 is outside the sequence's 2 keys",
           [](auto& c) { c.int32("leftpad_k", 1) = 3; }},
          {"leftpad_k[0] = -1 is outside", [](auto& c) { c.int32("leftpad_k", 0) = -1; }},
          {"v must have shape (total_k, num_heads_k, head_size_v)",
           [](auto& c) { c["v"].shape[0] = 6; }},
      });
}

TEST(ApiCheck, PagedVarlenForwardRejects) {
  expect_rejected<FwdCall>(
      make_paged_varlen_fwd, flash_attn_mha_varlen_fwd,
      {
          {"k must have shape (num_blocks, page_block_size, num_heads_k, head_size)",
           [](auto& c) { c["k_pages"].ndim = 3; }},
          {"v must have shape (num_blocks, page_block_size, num_heads_k, head_size_v)",
           [](auto& c) { c["v_pages"].shape[0] = 4; }},
          {"block_table must have dtype torch.int32",
           [](auto& c) { c["block_table"].dtype = FLASH_ATTN_INT64; }},
          {"block_table must have contiguous last dimension",
           [](auto& c) { c["block_table"].stride[1] = 2; }},
          {"block_table must have shape (batch_size, max_num_blocks_per_seq) = (2, 2), got (3, 2)",
           [](auto& c) { c["block_table"].shape[0] = 3; }},
          {"block_table must have shape", [](auto& c) { c["block_table"].ndim = 1; }},
          {"Paged KV cache block size must be positive",
           [](auto& c) { c["k_pages"].shape[1] = c["v_pages"].shape[1] = 0; }},
          {"block_table[0][1] = 5 is outside the cache's 5 pages",
           [](auto& c) { c.int32("block_table", 1) = 5; }},
          {"block_table[1][0] = -1 is outside", [](auto& c) { c.int32("block_table", 2) = -1; }},
          {"exceeds the capacity addressable by block_table",
           [](auto& c) { c["block_table"].shape[1] = 1; }},
          {"block_table is too large",
           [](auto& c) { c["block_table"].shape[1] = int64_t{1} << 30; }},
      });
}

std::vector<Broken<BwdCall>> broken_backward_in_either_layout() {
  return {
      {"dout must be given", [](auto& c) { c.args.dout = nullptr; }},
      {"dk must be given", [](auto& c) { c.args.dk = nullptr; }},
      {"softmax_d must be given", [](auto& c) { c.args.softmax_d = nullptr; }},
      {"softmax_lse must be given", [](auto& c) { c.args.softmax_lse = nullptr; }},
      {"query and out must have the same dtype",
       [](auto& c) { c["out"].dtype = FLASH_ATTN_FLOAT16; }},
      {"query and dout must have the same dtype",
       [](auto& c) { c["dout"].dtype = FLASH_ATTN_FLOAT16; }},
      {"dq must have the same dtype as q", [](auto& c) { c["dq"].dtype = FLASH_ATTN_FLOAT16; }},
      {"dv must have the same dtype as q", [](auto& c) { c["dv"].dtype = FLASH_ATTN_FLOAT16; }},
      {"out tensor must have contiguous last dimension",
       [](auto& c) { c["out"].stride[c["out"].ndim - 1] = 2; }},
      {"dout tensor must have contiguous last dimension",
       [](auto& c) { c["dout"].stride[c["dout"].ndim - 1] = 2; }},
      {"dk must have contiguous last dimension",
       [](auto& c) { c["dk"].stride[c["dk"].ndim - 1] = 2; }},
      {"dout must have shape", [](auto& c) { c["dout"].shape[0] = 3; }},
      {"dq must have shape", [](auto& c) { c["dq"].shape[c["dq"].ndim - 2] = 2; }},
      {"dk must have shape", [](auto& c) { c["dk"].shape[c["dk"].ndim - 2] = 4; }},
      {"dv must have shape", [](auto& c) { c["dv"].shape[c["dv"].ndim - 1] = 8; }},
      {"dv must not overlap itself", [](auto& c) { c["dv"].stride[0] = 0; }},
      {"dq must not share memory with q", [](auto& c) { c["dq"].data = c["q"].data; }},
      {"dk must not share memory with dv", [](auto& c) { c["dv"].data = c["dk"].data; }},
      {"softmax_d must have dtype fp32",
       [](auto& c) { c["softmax_d"].dtype = FLASH_ATTN_FLOAT16; }},
      {"softmax_d must have shape", [](auto& c) { c["softmax_d"].shape[0] += 1; }},
      {"dlse must have dtype fp32", [](auto& c) { c["dlse"].dtype = FLASH_ATTN_FLOAT16; }},
      {"dlse must have shape", [](auto& c) { c["dlse"].shape[0] += 1; }},
      {"ds_aux must be given if and only if s_aux is given",
       [](auto& c) { c.args.ds_aux = nullptr; }},
      {"ds_aux must be given if and only if s_aux is given",
       [](auto& c) { c.args.score.s_aux = nullptr; }},
      {"ds_aux must have shape (num_heads)", [](auto& c) { c["ds_aux"].shape[0] = 1; }},
      {"dattn_bias needs attn_bias", [](auto& c) { c.args.score.attn_bias = nullptr; }},
      {"dattn_bias must have shape", [](auto& c) { c["dattn_bias"].shape[1] = 4; }},
      {"dattn_bias must have dtype fp32",
       [](auto& c) { c["dattn_bias"].dtype = FLASH_ATTN_FLOAT16; }},
      {"rng_state must be given", [](auto& c) { c.args.rng_state = nullptr; }},
      {"FlashAttention backward only supports head dimension at most 576",
       [](auto& c) { c["q"].shape[c["q"].ndim - 1] = 600; }},
      {"softmax_scale must be finite", [](auto& c) { c.args.score.softmax_scale = INFINITY; }},
  };
}

TEST(ApiCheck, BackwardRejects) {
  expect_rejected<BwdCall>(make_bwd, flash_attn_mha_bwd, broken_backward_in_either_layout());
  expect_rejected<BwdCall>(make_bwd, flash_attn_mha_bwd,
                           {{"cu_seqlens_q is an argument of mha_varlen_bwd",
                             [](auto& c) { c.args.cu_seqlens_q = c.add_int32("cu", {0, 5}); }}});
}

TEST(ApiCheck, VarlenBackwardRejects) {
  expect_rejected<BwdCall>(make_varlen_bwd, flash_attn_mha_varlen_bwd,
                           broken_backward_in_either_layout());
  expect_rejected<BwdCall>(
      make_varlen_bwd, flash_attn_mha_varlen_bwd,
      {
          {"cu_seqlens_k must not decrease", [](auto& c) { c.int32("cu_seqlens_k", 1) = 9; }},
          {"cu_seqlens_q ends at 6", [](auto& c) { c.int32("cu_seqlens_q", 2) = 6; }},
          {"longer than the max_seqlen of 2",
           [](auto& c) {
             c.args.max_seqlen_k = 2;
             c["attn_bias"].shape[3] = c["dattn_bias"].shape[3] = 2;
           }},
      });
}

TEST(ApiCheck, CombineRejects) {
  expect_rejected<CombineCall>(
      make_combine, flash_attn_combine,
      {
          {"out_partial must have shape", [](auto& c) { c["out_partial"].ndim = 4; }},
          {"out_partial must have dtype fp32",
           [](auto& c) { c["out_partial"].dtype = FLASH_ATTN_FLOAT16; }},
          {"out_partial must have contiguous last dimension",
           [](auto& c) { c["out_partial"].stride[4] = 2; }},
          {"num_splits must be positive", [](auto& c) { c["out_partial"].shape[0] = 0; }},
          {"lse_partial must have shape (num_splits, batch_size, seqlen, num_heads) = (3, 2, 5, 4)",
           [](auto& c) { c["lse_partial"].shape[0] = 2; }},
          {"out must have dtype fp16, bf16 or fp32",
           [](auto& c) { c["out"].dtype = FLASH_ATTN_INT32; }},
          {"out must have shape", [](auto& c) { c["out"].shape[1] = 4; }},
          {"out must not overlap itself", [](auto& c) { c["out"].stride[1] = 1; }},
          {"lse must have shape", [](auto& c) { c["lse"].shape[2] = 3; }},
          {"lse must not share memory with lse_partial",
           [](auto& c) { c["lse"].data = c["lse_partial"].data; }},
          {"head dimension at most 576", [](auto& c) { c["out_partial"].shape[4] = 577; }},
      });
}

std::vector<unsigned char> bytes_of(const flash_attn_tensor& t) {
  const int64_t count = std::accumulate(t.shape, t.shape + t.ndim, int64_t{1}, std::multiplies<>());
  const auto* data = static_cast<const unsigned char*>(t.data);
  return {data, data + count * element_bytes(t.dtype)};
}

// Different values between -2 and 2, whichever floating-point type t has.
void fill(const flash_attn_tensor& t) {
  const size_t size = element_bytes(t.dtype), bytes = bytes_of(t).size();
  for (size_t i = 0; i < bytes; i += size) {
    const float x = static_cast<float>(i / size * 37 % 11) / 5.f - 1.f;
    std::memcpy(static_cast<char*>(t.data) + i, reinterpret_cast<const char*>(&x) + 4 - size, size);
  }
}

template <typename C, typename Run>
void expect_same_out_without_lse(C (*make)(), Run run, std::initializer_list<const char*> inputs) {
  C with = make(), without = make();
  for (const char* name : inputs) {
    fill(with[name]);
    fill(without[name]);
  }
  without.args.softmax_lse = nullptr;
  ASSERT_EQ(run(&with.args), FLASH_ATTN_OK) << flash_attn_last_error();
  ASSERT_EQ(run(&without.args), FLASH_ATTN_OK) << flash_attn_last_error();
  EXPECT_EQ(bytes_of(without["out"]), bytes_of(with["out"]));
  C untouched = make();
  EXPECT_NE(bytes_of(with["out"]), bytes_of(untouched["out"]));
  EXPECT_NE(bytes_of(with["softmax_lse"]), bytes_of(without["softmax_lse"]));
}

TEST(ApiCheck, SoftmaxLseIsOptional) {
  expect_same_out_without_lse<FwdCall>(make_fwd, flash_attn_mha_fwd, {"q", "k", "v"});
  expect_same_out_without_lse<FwdCall>(make_varlen_fwd, flash_attn_mha_varlen_fwd, {"q", "k", "v"});
  expect_same_out_without_lse<KvcacheCall>(make_kvcache, flash_attn_mha_fwd_kvcache,
                                           {"q", "k", "v", "k_cache", "v_cache"});
}

TEST(ApiCheck, NullArguments) {
  EXPECT_EQ(flash_attn_mha_fwd(nullptr), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_EQ(flash_attn_mha_bwd(nullptr), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_EQ(flash_attn_mha_fwd_kvcache(nullptr), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_EQ(flash_attn_combine(nullptr), FLASH_ATTN_INVALID_ARGUMENT);
  FwdCall c = make_fwd();
  EXPECT_EQ(flash_attn_mha_fwd_workspace_size(&c.args, nullptr), FLASH_ATTN_INVALID_ARGUMENT);
  EXPECT_STREQ(flash_attn_last_error(), "bytes must not be NULL");
}

}  // namespace
}  // namespace flash_test
