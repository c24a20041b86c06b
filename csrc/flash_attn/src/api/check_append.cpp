// Appending to a KV cache: what the call reads beside the rows that it writes.
//
// Two cases of shared memory are fine, since nothing is read after it has changed: new rows that
// are their own places in the cache already, and caches of which one's rows are parts of the
// other's (the keys and values of multi-head latent attention), if the new rows are the same parts
// of one another.
#include <algorithm>
#include <vector>

#include "api/check.h"
#include "api/tensors.h"

namespace flash {
namespace {

struct Append {
  Region cache;
  Arg rows;  // [b, seqlen_knew, hk, d]
  bool rotated;
};

bool same_strides(const flash_attn_tensor& x, const flash_attn_tensor& y) {
  for (int i = 0; i < x.ndim - 1; ++i) {
    if (x.shape[i] > 1 && x.stride[i] != y.stride[i]) return false;
  }
  return true;
}

// Elements from x's first to y's; their difference in bytes is a multiple of an element.
int64_t distance(const Arg& x, const Arg& y) {
  return (static_cast<const char*>(y.t->data) - static_cast<const char*>(x.t->data)) /
         element_bytes(x.t->dtype);
}

// Each row of `part` lies within the same row of `whole`.
bool has_rows_within(const Arg& part, const Arg& whole) {
  const int64_t first = distance(whole, part);
  return first >= 0 && first + part.size(3) <= whole.size(3) && same_strides(*part.t, *whole.t);
}

void check_shared_caches(const Append& k, const Append& v, const Flash_fwd_params& p) {
  if (!share_memory(k.cache, v.cache)) return;
  require(has_rows_within(v.cache, k.cache) || has_rows_within(k.cache, v.cache),
          "k_cache must not share memory with v_cache, unless the rows of one are parts of the "
          "same rows of the other");
  const int64_t first = distance(k.cache, v.cache);
  require(distance(k.rows, v.rows) == first && same_strides(*k.rows.t, *v.rows.t),
          "v must be the part of k that v_cache is of k_cache: their rows share memory");
  require(p.rotary_dim == 0 || first >= p.rotary_dim,
          "rotary embedding must not change the part of k_cache that v_cache shares: it rotates "
          "elements 0 to ",
          p.rotary_dim - 1, ", and v_cache starts at ", first);
}

// `count` rows of x from (outer, row) on: [count, hk, d].
flash_attn_tensor rows_of(const flash_attn_tensor& x, int64_t outer, int64_t row, int64_t count) {
  flash_attn_tensor rows = x;
  rows.ndim = 3;
  rows.data = static_cast<char*>(x.data) +
              (outer * x.stride[0] + row * x.stride[1]) * element_bytes(x.dtype);
  std::copy_n(x.shape + 1, 3, rows.shape);
  std::copy_n(x.stride + 1, 3, rows.stride);
  rows.shape[0] = count;
  return rows;
}

// Rows that are written side by side, from the new rows `source`.
void check_written(const Append& append, const flash_attn_tensor& written,
                   const flash_attn_tensor& source, const std::vector<Region>& readers) {
  const bool in_place = written.data == source.data && same_strides(written, source);
  if (in_place && !append.rotated) return;
  for (const Region& reader : readers) {
    if (!share_memory({"", &written}, reader)) continue;
    const bool itself = in_place && reader.t == append.rows.t && !overlaps_itself(append.rows);
    require(itself, append.cache.name, " must not share memory with ", reader.name,
            " in the rows that are appended");
  }
}

// What sequence i appends, page by page.
void check_sequence(const Append& append, int64_t i, const std::vector<Region>& readers,
                    const Flash_fwd_params& p) {
  const bool paged = p.block_table != nullptr;
  for (int64_t done = 0; done < p.seqlen_knew;) {
    int64_t row = p.seqused_k[i] + done, count = p.seqlen_knew - done;
    int64_t outer = p.cache_batch_idx != nullptr ? p.cache_batch_idx[i] : i;
    if (paged) {
      outer = p.block_table[i * p.block_table_batch_stride + row / p.page_size];
      row %= p.page_size;
      count = std::min(count, p.page_size - row);
    }
    check_written(append, rows_of(*append.cache.t, outer, row, count),
                  rows_of(*append.rows.t, i, done, count), readers);
    done += count;
  }
}

// The rows that are written are known where the host can read the lengths; elsewhere they may be
// any of the cache.
void check_readers(const Append& append, std::span<const Region> inputs,
                   flash_attn_device_type type, const Flash_fwd_params& p) {
  if (type != FLASH_ATTN_CPU) return check_distinct({&append.cache, 1}, inputs);
  std::vector<Region> readers;
  for (const Region& input : inputs) {
    if (share_memory(append.cache, input)) readers.push_back(input);
  }
  if (readers.empty()) return;
  for (int64_t i = 0; i < p.b; ++i) check_sequence(append, i, readers, p);
}

}  // namespace

void check_append_aliases(const flash_attn_kvcache_args& args, const Flash_fwd_params& p) {
  const Append k{{"k_cache", args.k_cache}, {"k", args.k}, p.rotary_dim > 0};
  const Append v{{"v_cache", args.v_cache}, {"v", args.v}, false};
  check_shared_caches(k, v, p);
  const auto all = read_by(args);
  const auto readers = std::span(all).subspan(2);  // less the caches
  for (const Append& append : {k, v}) check_readers(append, readers, args.q->device_type, p);
}

}  // namespace flash
