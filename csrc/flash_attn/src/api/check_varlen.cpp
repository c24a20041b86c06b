// Packed batches: cu_seqlens, used keys, left padding, block tables.
#include <algorithm>
#include <limits>

#include "api/check.h"

namespace flash {
namespace {

void check_max_seqlen(const char* name, int64_t value) {
  require(value >= 0, name, " must not be negative, got ", value);
  require(value <= std::numeric_limits<int32_t>::max(), name, " is too large: ", value);
}

// Returns the longest sequence's length. `rows` bounds the last entry.
int64_t check_cumulative(const char* name, const int32_t* cu_seqlens, int64_t b, int64_t max_seqlen,
                         int64_t rows, const char* tensor) {
  require(cu_seqlens[0] == 0, name, " must start at 0, got ", cu_seqlens[0]);
  int64_t longest = 0;
  for (int64_t i = 0; i < b; ++i) {
    const int64_t length = int64_t{cu_seqlens[i + 1]} - cu_seqlens[i];
    require(length >= 0, name, " must not decrease: entry ", i + 1, " is ", cu_seqlens[i + 1],
            " after ", cu_seqlens[i]);
    longest = std::max(longest, length);
  }
  require(cu_seqlens[b] <= rows, name, " ends at ", cu_seqlens[b], ", beyond the ", rows,
          " rows of ", tensor);
  require(longest <= max_seqlen, name, " holds a sequence of length ", longest,
          ", longer than the max_seqlen of ", max_seqlen);
  return longest;
}

// The number of keys of sequence i, after seqused_k.
int64_t check_key_length(const Attention_params& p, int64_t i) {
  const int64_t length = int64_t{p.cu_seqlens_k[i + 1]} - p.cu_seqlens_k[i];
  if (p.seqused_k == nullptr) return length;
  require(p.seqused_k[i] >= 0 && p.seqused_k[i] <= length, "seqused_k[", i, "] = ", p.seqused_k[i],
          " is outside the sequence's ", length, " keys");
  return p.seqused_k[i];
}

}  // namespace

void check_cu_seqlens(const Arg& cu_seqlens_q, const Arg& cu_seqlens_k, int64_t max_seqlen_q,
                      int64_t max_seqlen_k, const Arg& q, Attention_params& p) {
  require(cu_seqlens_q.given(), "cu_seqlens_q must be given");
  require(cu_seqlens_q.t->ndim == 1, "cu_seqlens_q must have shape (batch_size + 1), got ",
          cu_seqlens_q.t->ndim, " dimensions");
  p.b = std::max<int64_t>(cu_seqlens_q.size(0), 1) - 1;
  check_batch(p);
  check_int32(cu_seqlens_q, q, {{"batch_size + 1", p.b + 1}});
  check_int32(cu_seqlens_k, q, {{"batch_size + 1", p.b + 1}});
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.t->data);
  p.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.t->data);
  check_max_seqlen("max_seqlen_q", max_seqlen_q);
  check_max_seqlen("max_seqlen_k", max_seqlen_k);
  p.seqlen_q = max_seqlen_q;
  p.seqlen_k = max_seqlen_k;
}

int64_t check_block_table(const Arg& block_table, const Arg& q, const Arg& k, Attention_params& p) {
  check_dtype(block_table, FLASH_ATTN_INT32, "block_table must have dtype torch.int32");
  check_device(block_table, q);
  check_view(block_table, 2, "(batch_size, max_num_blocks_per_seq)");
  const int64_t max_pages = block_table.size(1);
  check_extents(block_table, {{"batch_size", p.b}, {"max_num_blocks_per_seq", max_pages}});
  check_last_stride(block_table, "block_table must have contiguous last dimension");
  p.page_size = k.size(1);
  require(p.page_size > 0, "Paged KV cache block size must be positive");
  require(max_pages <= std::numeric_limits<int32_t>::max() / p.page_size,
          "block_table is too large: its pages hold more tokens than int32 can count");
  p.block_table = static_cast<const int32_t*>(block_table.t->data);
  p.block_table_batch_stride = block_table.stride(0);
  p.max_pages = max_pages;
  return max_pages;
}

void check_pages(const Attention_params& p, int64_t sequence, int64_t first, int64_t last,
                 int64_t num_pages) {
  const int32_t* pages = p.block_table + sequence * p.block_table_batch_stride;
  const int64_t end = (last + p.page_size - 1) / p.page_size;
  for (int64_t i = first / p.page_size; i < end; ++i) {
    require(pages[i] >= 0 && pages[i] < num_pages, "block_table[", sequence, "][", i,
            "] = ", pages[i], " is outside the cache's ", num_pages, " pages");
  }
}

void check_varlen_contents(const Arg& q, const Arg& k, int64_t max_pages, Attention_params& p) {
  const bool paged = p.block_table != nullptr;
  const int64_t longest_q =
      check_cumulative("cu_seqlens_q", p.cu_seqlens_q, p.b, p.seqlen_q, q.size(0), q.name);
  const int64_t rows_k = paged ? std::numeric_limits<int32_t>::max() : k.size(0);
  check_cumulative("cu_seqlens_k", p.cu_seqlens_k, p.b, p.seqlen_k, rows_k, k.name);
  int64_t longest_k = 0;
  for (int64_t i = 0; i < p.b; ++i) {
    const int64_t length = check_key_length(p, i);
    const int64_t first = p.leftpad_k == nullptr ? 0 : p.leftpad_k[i];
    require(first >= 0 && first <= length, "leftpad_k[", i, "] = ", first,
            " is outside the sequence's ", length, " keys");
    longest_k = std::max(longest_k, length);
    if (!paged) continue;
    require(length <= max_pages * p.page_size, "Paged KV cache: sequence ", i, " has ", length,
            " keys, which exceeds the capacity addressable by block_table (", max_pages,
            " pages of ", p.page_size, ")");
    check_pages(p, i, first, length, k.size(0));
  }
  p.seqlen_q = longest_q;
  p.seqlen_k = longest_k;
}

}  // namespace flash
