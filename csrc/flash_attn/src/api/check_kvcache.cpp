// mha_fwd_kvcache.
#include <algorithm>
#include <vector>

#include "api/check.h"
#include "api/tensors.h"

namespace flash {
namespace {

constexpr char kHeadDimLimit[] = "FlashAttention forward only supports head dimension at most 576";

struct Cache {
  Arg q, k, v;
  int64_t max_pages = 0;  // columns of block_table
};

// k, v: the tokens to append.
void check_new_keys(const flash_attn_kvcache_args& args, const Cache& cache, Flash_fwd_params& p) {
  const Arg k{"k", args.k}, v{"v", args.v};
  require(k.given() || !v.given(), "If value is supplied, key must also be passed in");
  if (!k.given()) return;
  require(v.given(), "If key is supplied, value must also be passed in");
  require(args.cache_seqlens != nullptr,
          "If key is supplied, seqlens_k must also be passed in (cache_seqlens)");
  check_view(k, 4, "(batch_size, seqlen_knew, num_heads_k, head_size)");
  p.seqlen_knew = k.size(1);
  require(p.seqlen_knew <= p.seqlen_k,
          "If key is supplied, it must have seqlen <= the seqlen of the KV cache: k has ",
          p.seqlen_knew, " rows, the cache ", p.seqlen_k);
  // Of a cache in q's dtype the sentences are FlashAttention-2's.
  const bool own_dtype = p.kv_dtype != p.dtype;
  const Arg& like = own_dtype ? cache.k : cache.q;
  check_dtype_of_q(k, like,
                   own_dtype ? "Key must have the same dtype as the KV cache"
                             : "Key must have the same dtype as query");
  check_device(k, cache.q);
  check_extents(k, {{"batch_size", p.b},
                    {"seqlen_knew", p.seqlen_knew},
                    {"num_heads_k", p.h_k},
                    {"head_size", p.d}});
  check_last_stride(k, "Key tensor must have contiguous last dimension");
  check_view(v, 4, "(batch_size, seqlen_knew, num_heads_k, head_size_v)");
  check_dtype_of_q(v, like,
                   own_dtype ? "Value must have the same dtype as the KV cache"
                             : "Value must have the same dtype as query");
  check_device(v, cache.q);
  check_extents(v, {{"batch_size", p.b},
                    {"seqlen_knew", p.seqlen_knew},
                    {"num_heads_k", p.h_k},
                    {"head_size_v", p.d_v}});
  check_last_stride(v, "Value tensor must have contiguous last dimension");
  check_no_self_overlap(cache.k);
  check_no_self_overlap(cache.v);
  p.knew = batched_operand(k);
  p.vnew = batched_operand(v);
}

// Both tables of a rotary embedding: dtype of q, [seqlen_ro, rotary_dim / 2]. Returns the number of
// rows.
int64_t check_rotary(const flash_attn_kvcache_args& args, const Arg& q, Flash_fwd_params& p) {
  const Arg cos{"rotary_cos", args.rotary_cos}, sin{"rotary_sin", args.rotary_sin};
  require(cos.given() || !sin.given(),
          "If rotary sin is provided, rotary cos must also be provided");
  if (!cos.given()) return 0;
  require(args.k != nullptr,
          "If rotary cos/sin are provided, new key / value to be appended to KV cache must also be "
          "provided");
  require(p.kv_dtype != Dtype::kFloat8E4M3,
          "rotary embedding (rotary_cos, rotary_sin) does not take fp8 keys");
  check_device(cos, q);
  check_view(cos, 2, "(seqlen_ro, rotary_dim / 2)");
  const int64_t rows = cos.size(0), half = cos.size(1);
  require(half <= p.d / 2, "rotary_dim must be <= headdim: 2 * ", half, " > ", p.d);
  require(rows >= p.seqlen_k,
          "cos/sin seqlen must be at least the seqlen of KV cache: rotary_cos has ", rows,
          " rows, the cache ", p.seqlen_k);
  check_dtype_of_q(cos, q, "rotary_cos must have the same dtype as query");
  require(sin.given(), "If rotary cos is provided, rotary sin must also be provided");
  check_device(sin, q);
  check_shape(sin, {{"seqlen_ro", rows}, {"rotary_dim / 2", half}});
  check_dtype_of_q(sin, q, "rotary_sin must have the same dtype as query");
  check_last_stride(cos, "rotary_cos must have contiguous last dimension");
  check_last_stride(sin, "rotary_sin must have contiguous last dimension");
  p.rotary_cos = cos.t->data;
  p.rotary_sin = sin.t->data;
  p.rotary_cos_row_stride = cos.stride(0);
  p.rotary_sin_row_stride = sin.stride(0);
  p.rotary_dim = 2 * half;
  p.rotary_rows = rows;
  p.is_rotary_interleaved = args.is_rotary_interleaved != 0;
  return rows;
}

// An int32 a sequence; null when not given. `sentence`: of a wrong dtype, FlashAttention-2's, which
// knows the argument by another name.
const int32_t* check_lengths(const Arg& x, const Arg& q, int64_t b, const char* sentence) {
  if (x.given()) check_dtype(x, FLASH_ATTN_INT32, sentence);
  return check_per_sequence(x, q, b);
}

// Where each sequence's rows are: the cache's own index, cache_batch_idx or block_table.
void check_cache_geometry(const flash_attn_kvcache_args& args, Cache& cache, Flash_fwd_params& p) {
  const Arg block_table{"block_table", args.block_table};
  if (block_table.given()) {
    require(args.cache_batch_idx == nullptr, "Paged KVcache does not support cache_batch_idx");
    cache.max_pages = check_block_table(block_table, cache.q, cache.k, p);
    p.seqlen_k = cache.max_pages * p.page_size;
    return;
  }
  p.seqlen_k = cache.k.size(1);
  p.cache_batch_idx = check_per_sequence({"cache_batch_idx", args.cache_batch_idx}, cache.q, p.b);
  require(p.cache_batch_idx != nullptr || cache.k.size(0) >= p.b, "k_cache has ", cache.k.size(0),
          " rows for a batch size of ", p.b, ": cache_batch_idx must be given");
}

// The cache's rows or pages that the call writes to, each at most once. Memory is kept between
// calls.
void check_written_once(const Flash_fwd_params& p) {
  static thread_local std::vector<int32_t> written;
  written.clear();
  for (int64_t i = 0; i < p.b; ++i) {
    if (p.cache_batch_idx != nullptr) written.push_back(p.cache_batch_idx[i]);
    if (p.block_table == nullptr) continue;
    const int32_t* pages = p.block_table + i * p.block_table_batch_stride;
    const int64_t first = p.seqused_k[i] / p.page_size;
    const int64_t last = (p.seqused_k[i] + p.seqlen_knew - 1) / p.page_size;
    written.insert(written.end(), pages + first, pages + last + 1);
  }
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  require(twice == written.end(), p.block_table != nullptr ? "block_table" : "cache_batch_idx",
          " appends twice to ", p.block_table != nullptr ? "page " : "row ",
          twice == written.end() ? 0 : *twice, " of the KV cache");
}

void check_sequence(const Cache& cache, int64_t rotary_rows, int64_t i, const Flash_fwd_params& p) {
  if (p.cache_batch_idx != nullptr) {
    const int64_t row = p.cache_batch_idx[i];
    require(row >= 0 && row < cache.k.size(0), "cache_batch_idx[", i, "] = ", row,
            " is outside the cache's ", cache.k.size(0), " rows");
  }
  const int64_t before = p.seqused_k == nullptr ? p.seqlen_k : p.seqused_k[i];
  const int64_t after = before + p.seqlen_knew;
  require(before >= 0, "cache_seqlens[", i, "] must not be negative, got ", before);
  require(after <= p.seqlen_k || p.block_table == nullptr,
          "Paged KV cache: max(seqlens_k) + seqlen_knew = ", before, " + ", p.seqlen_knew,
          " exceeds the capacity addressable by block_table (", cache.max_pages, " pages of ",
          p.page_size, ")");
  require(after <= p.seqlen_k, "cache_seqlens[", i, "] = ", before, " plus ", p.seqlen_knew,
          " new tokens exceeds the ", p.seqlen_k, " rows of the KV cache");
  const int64_t first = p.leftpad_k == nullptr ? 0 : p.leftpad_k[i];
  require(first >= 0 && first <= before, "cache_leftpad[", i, "] = ", first,
          " is outside the sequence's ", before, " cached keys");
  if (p.block_table != nullptr) check_pages(p, i, first, after, cache.k.size(0));
  if (p.rotary_cos != nullptr) {
    const bool by_row =
        p.window_left >= 0 || p.window_right >= 0;  // else one angle for all queries
    const int64_t q_rows = by_row ? p.seqlen_q : std::min<int64_t>(p.seqlen_q, 1);
    require(before + q_rows <= rotary_rows, "rotary_cos has ", rotary_rows, " rows, but query ",
            "positions of sequence ", i, " reach ", before + q_rows - 1);
  }
}

}  // namespace

Flash_fwd_params check_mha_fwd_kvcache(const flash_attn_kvcache_args& args) {
  Flash_fwd_params p;
  Cache cache{{"q", args.q}, {"k_cache", args.k_cache}, {"v_cache", args.v_cache}};
  const Arg& q = cache.q;
  const bool paged = args.block_table != nullptr;
  check_qkv(q, cache.k, cache.v, paged ? Layout::kPagedCache : Layout::kCache, kHeadDimLimit, p);
  check_cache_geometry(args, cache, p);
  require(args.score.attn_bias == nullptr, "mha_fwd_kvcache does not take attn_bias");
  check_score(args.score, q, p);
  check_descales(descales_of(args), q, p);
  check_new_keys(args, cache, p);
  p.seqused_k = check_lengths({"cache_seqlens", args.cache_seqlens}, q, p.b,
                              "seqlens_k must have dtype int32");
  p.leftpad_k = check_lengths({"cache_leftpad", args.cache_leftpad}, q, p.b,
                              "leftpad_k must have dtype int32");
  const int64_t rotary_rows = check_rotary(args, q, p);
  const Arg out{"out", args.out}, lse{"softmax_lse", args.softmax_lse};
  p.o = check_out_like(out, q, false, p, "Output must have the same dtype as inputs",
                       "Output tensor must have contiguous last dimension");
  if (lse.given()) check_lse(lse, q, false, p);
  p.num_splits = check_num_splits(args.num_splits);
  check_no_self_overlap(out);
  if (lse.given()) check_no_self_overlap(lse);
  check_distinct(written_by(args), read_by(args));
  if (q.t->device_type == FLASH_ATTN_CPU) {
    for (int64_t i = 0; i < p.b; ++i) check_sequence(cache, rotary_rows, i, p);
    if (p.seqlen_knew > 0) check_written_once(p);
  }
  if (p.seqlen_knew > 0 && p.b > 0) check_append_aliases(args, p);
  return p;
}

}  // namespace flash
