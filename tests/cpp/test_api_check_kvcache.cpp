// The KV cache: every broken argument is turned down with its sentence, and neither outputs nor
// cache are written.
#include "api/check.h"
#include "api_calls.h"

namespace flash_test {
namespace {

std::vector<Broken<KvcacheCall>> broken_in_either_cache() {
  return {
      {"k_cache must be given", [](auto& c) { c.args.k_cache = nullptr; }},
      {"query and key must have the same dtype: q has fp32, k_cache has fp16",
       [](auto& c) { c["k_cache"].dtype = FLASH_ATTN_FLOAT16; }},
      {"Input tensor must have contiguous last dimension: v_cache has stride 2",
       [](auto& c) { c["v_cache"].stride[3] = 2; }},
      {"v_cache must have shape", [](auto& c) { c["v_cache"].shape[0] = 1; }},
      {"k_cache must not overlap itself", [](auto& c) { c["k_cache"].stride[0] = 0; }},
      {"v_cache must not overlap itself", [](auto& c) { c["v_cache"].stride[1] = 0; }},
      {"If key is supplied, value must also be passed in", [](auto& c) { c.args.v = nullptr; }},
      {"If value is supplied, key must also be passed in", [](auto& c) { c.args.k = nullptr; }},
      {"If key is supplied, seqlens_k must also be passed in",
       [](auto& c) { c.args.cache_seqlens = nullptr; }},
      {"If key is supplied, it must have seqlen <= the seqlen of the KV cache: k has 8 rows",
       [](auto& c) { c["k"].shape[1] = 8; }},
      {"Key must have the same dtype as query", [](auto& c) { c["k"].dtype = FLASH_ATTN_FLOAT16; }},
      {"Value must have the same dtype as query",
       [](auto& c) { c["v"].dtype = FLASH_ATTN_FLOAT16; }},
      {"Key tensor must have contiguous last dimension", [](auto& c) { c["k"].stride[3] = 2; }},
      {"Value tensor must have contiguous last dimension", [](auto& c) { c["v"].stride[3] = 2; }},
      {"k must have shape (batch_size, seqlen_knew, num_heads_k, head_size)",
       [](auto& c) { c["k"].ndim = 3; }},
      {"k must have shape (batch_size, seqlen_knew, num_heads_k, head_size)",
       [](auto& c) { c["k"].shape[2] = 4; }},
      {"v must have shape (batch_size, seqlen_knew, num_heads_k, head_size_v)",
       [](auto& c) { c["v"].shape[1] = 1; }},
      {"seqlens_k must have dtype int32: cache_seqlens has int64",
       [](auto& c) { c["cache_seqlens"].dtype = FLASH_ATTN_INT64; }},
      {"cache_seqlens must have shape (batch_size)",
       [](auto& c) { c["cache_seqlens"].shape[0] = 1; }},
      {"must not be negative, got -1", [](auto& c) { c.int32("cache_seqlens", 1) = -1; }},
      {"leftpad_k must have dtype int32: cache_leftpad has fp32",
       [](auto& c) { c["cache_leftpad"].dtype = kFp32; }},
      {"cache_leftpad[1] = 5 is outside", [](auto& c) { c.int32("cache_leftpad", 1) = 5; }},
      {"cache_leftpad[0] = -1 is outside", [](auto& c) { c.int32("cache_leftpad", 0) = -1; }},
      {"If rotary cos/sin are provided, new key / value to be appended to KV cache must also be "
       "provided",
       [](auto& c) { c.args.k = c.args.v = nullptr; }},
      {"If rotary cos is provided, rotary sin must also be provided",
       [](auto& c) { c.args.rotary_sin = nullptr; }},
      {"If rotary sin is provided, rotary cos must also be provided",
       [](auto& c) { c.args.rotary_cos = nullptr; }},
      {"rotary_dim must be <= headdim", [](auto& c) { c["rotary_cos"].shape[1] = 16; }},
      {"rotary_sin must have shape (seqlen_ro, rotary_dim / 2) = (16, 3), got (16, 8)",
       [](auto& c) { c["rotary_cos"].shape[1] = 3; }},
      {"cos/sin seqlen must be at least the seqlen of KV cache: rotary_cos has 5 rows, the cache",
       [](auto& c) { c["rotary_cos"].shape[0] = 5; }},
      {"rotary_cos has 8 rows, but query positions of sequence 1 reach 8",
       [](auto& c) { c["rotary_cos"].shape[0] = c["rotary_sin"].shape[0] = 8; }},
      {"rotary_cos must have the same dtype as query",
       [](auto& c) { c["rotary_cos"].dtype = FLASH_ATTN_FLOAT16; }},
      {"rotary_sin must have the same dtype as query",
       [](auto& c) { c["rotary_sin"].dtype = FLASH_ATTN_FLOAT16; }},
      {"rotary_sin must have shape", [](auto& c) { c["rotary_sin"].shape[0] = 15; }},
      {"mha_fwd_kvcache does not take attn_bias",
       [](auto& c) { c.args.score.attn_bias = c.add("bias", kFp32, {1, 1, 1, 1}); }},
      {"num_splits > 128 not supported, got 200", [](auto& c) { c.args.num_splits = 200; }},
      {"out must not share memory with k_cache",
       [](auto& c) { c["out"].data = c["k_cache"].data; }},
      {"k_cache must not share memory with v_cache",
       [](auto& c) { c["v_cache"].data = c["k_cache"].data; }},
      {"out must have shape (batch_size, seqlen_q, num_heads, head_size_v)",
       [](auto& c) { c["out"].shape[1] = 1; }},
  };
}

TEST(ApiCheck, KvcacheRejects) {
  expect_rejected<KvcacheCall>(make_kvcache, flash_attn_mha_fwd_kvcache, broken_in_either_cache());
  expect_rejected<KvcacheCall>(
      make_kvcache, flash_attn_mha_fwd_kvcache,
      {
          {"cache_seqlens[0] = 6 plus 2 new tokens exceeds the 7 rows of the KV cache",
           [](auto& c) { c.int32("cache_seqlens", 0) = 6; }},
          {"exceeds the 7 rows", [](auto& c) { c.int32("cache_seqlens", 0) = INT32_MAX; }},
          {"cache_batch_idx must have dtype int32",
           [](auto& c) { c["cache_batch_idx"].dtype = FLASH_ATTN_INT64; }},
          {"cache_batch_idx[0] = 3 is outside the cache's 3 rows",
           [](auto& c) { c.int32("cache_batch_idx", 0) = 3; }},
          {"cache_batch_idx[1] = -1 is outside",
           [](auto& c) { c.int32("cache_batch_idx", 1) = -1; }},
          {"cache_batch_idx appends twice to row 2 of the KV cache",
           [](auto& c) { c.int32("cache_batch_idx", 1) = 2; }},
          {"k_cache has 1 rows for a batch size of 2",
           [](auto& c) {
             c.args.cache_batch_idx = nullptr;
             c["k_cache"].shape[0] = c["v_cache"].shape[0] = 1;
           }},
      });
}

TEST(ApiCheck, PagedKvcacheRejects) {
  expect_rejected<KvcacheCall>(make_paged_kvcache, flash_attn_mha_fwd_kvcache,
                               broken_in_either_cache());
  expect_rejected<KvcacheCall>(
      make_paged_kvcache, flash_attn_mha_fwd_kvcache,
      {
          {"Paged KVcache does not support cache_batch_idx",
           [](auto& c) { c.args.cache_batch_idx = c.add_int32("idx", {0, 1}); }},
          {"block_table must have dtype torch.int32",
           [](auto& c) { c["block_table"].dtype = FLASH_ATTN_INT64; }},
          {"Paged KV cache: max(seqlens_k) + seqlen_knew = 5 + 2 exceeds the capacity addressable "
           "by block_table (3 pages of 2)",
           [](auto& c) { c.int32("cache_seqlens", 1) = 5; }},
          {"block_table[0][2] = 8 is outside the cache's 8 pages",
           [](auto& c) { c.int32("block_table", 2) = 8; }},
          {"block_table[1][0] = -1 is outside", [](auto& c) { c.int32("block_table", 3) = -1; }},
          {"block_table appends twice to page 2 of the KV cache",
           [](auto& c) { c.int32("block_table", 5) = 2; }},
      });
}

TEST(ApiCheck, KvcacheWithoutAppendReadsTheWholeCache) {
  KvcacheCall c = make_kvcache();
  c.args.k = c.args.v = c.args.rotary_cos = c.args.rotary_sin = c.args.cache_seqlens = nullptr;
  c.int32("cache_batch_idx", 1) = 2;  // a row may be read twice
  c["k_cache"].stride[0] = 0;         // and need not exist twice
  const flash::Flash_fwd_params p = flash::check_mha_fwd_kvcache(c.args);
  EXPECT_EQ(p.seqused_k, nullptr);
  EXPECT_EQ(p.seqlen_k, kSk);
  EXPECT_EQ(p.knew.ptr, nullptr);
  EXPECT_EQ(p.k.batch_stride, 0);
}

TEST(ApiCheck, KvcacheParams) {
  KvcacheCall c = make_paged_kvcache();
  const flash::Flash_fwd_params p = flash::check_mha_fwd_kvcache(c.args);
  EXPECT_EQ(p.b, kBatch);
  EXPECT_EQ(p.page_size, 2);
  EXPECT_EQ(p.seqlen_k, 6);
  EXPECT_EQ(p.seqlen_knew, 2);
  EXPECT_EQ(p.block_table_batch_stride, 3);
  EXPECT_EQ(p.rotary_dim, 16);
  EXPECT_EQ(p.window_right, 0);
  EXPECT_EQ(p.k.batch_stride, 2 * kHeadsK * 16);
  EXPECT_EQ(p.seqused_k, c["cache_seqlens"].data);
  EXPECT_EQ(p.leftpad_k, c["cache_leftpad"].data);
}

}  // namespace
}  // namespace flash_test
