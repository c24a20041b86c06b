#include "rotary/sm80/launch.h"

#include <algorithm>
#include <limits>

#include "base/cuda_driver/row_kernel.h"
#include "rotary/sm80/launch_params.h"

#define FLASH_KERNEL(name, ...) extern "C" const char name##_fatbin[];
#include "generated/sm80_rotary.inc"
#undef FLASH_KERNEL

namespace flash::rotary::sm80 {
namespace {

#define FLASH_KERNEL(name, ...) cuda::RowKernel{__VA_ARGS__, {#name, name##_fatbin}},
constexpr cuda::RowKernel kernels[] = {
#include "generated/sm80_rotary.inc"
};
#undef FLASH_KERNEL

constexpr int kChunkBytes = 16;
// As many as run at a time on the largest devices: with more, a thread takes several heads, for
// which it reads the tables once.
constexpr int64_t kEnoughThreads = int64_t{1} << 17;

bool is_made_of_chunks(const Tokens& x, int64_t chunk) {
  return reinterpret_cast<uintptr_t>(x.ptr) % kChunkBytes == 0 &&
         (x.batch_stride | x.seq_stride | x.head_stride) % chunk == 0;
}

// Pairs that a thread takes at a time where it takes chunks.
int pairs_of_chunk(const Params& p) {
  return kChunkBytes / dtype_bytes(p.dtype) / (p.interleaved ? 2 : 1);
}

bool is_made_of_chunks(const Params& p, const Turned& x) {
  const int64_t bytes = dtype_bytes(p.table_dtype);
  const int64_t table_bytes = std::min<int64_t>(pairs_of_chunk(p) * bytes, kChunkBytes);
  bool is = true;
  for (const Matrix& m : {x.cos, x.sin})
    is = is && reinterpret_cast<uintptr_t>(m.ptr) % table_bytes == 0 &&
         m.row_stride * bytes % table_bytes == 0;
  const int64_t chunk = kChunkBytes / dtype_bytes(p.dtype);
  return is && is_made_of_chunks(x.in, chunk) && is_made_of_chunks(x.out, chunk);
}

bool copies(const Turned& x) { return x.heads > 0 && !x.in_place; }

bool by_chunks(const Params& p) {
  const int chunk = kChunkBytes / dtype_bytes(p.dtype);
  const int rest = copies(p.q) || copies(p.k) ? p.head_dim - p.rotary_dim : 0;
  return p.rotary_dim / 2 % pairs_of_chunk(p) == 0 && rest % chunk == 0 &&
         is_made_of_chunks(p, p.q) && (p.k.heads == 0 || is_made_of_chunks(p, p.k));
}

int units_of_head(const Params& p, Launch& launch) {
  launch.by_chunks = by_chunks(p);
  const int chunk = launch.by_chunks ? kChunkBytes / dtype_bytes(p.dtype) : 1;
  launch.turning_units = p.rotary_dim / 2 / (launch.by_chunks ? pairs_of_chunk(p) : 1);
  const bool has_rest = copies(p.q) || copies(p.k);
  return launch.turning_units + (has_rest ? (p.head_dim - p.rotary_dim) / chunk : 0);
}

// All but what differs between the launches of a call. Returns false if there is nothing to do.
bool plan(const Params& p, Launch& launch) {
  const int64_t tokens = p.batch * p.seqlen, heads = int64_t{p.q.heads} + p.k.heads;
  const int units = units_of_head(p, launch);
  if (tokens == 0 || heads == 0 || units == 0) return false;
  const int64_t most = std::max(p.q.heads, p.k.heads);
  launch.heads_of_thread = static_cast<int>(
      std::clamp<int64_t>(static_cast<int64_t>(static_cast<double>(tokens) *
                                               static_cast<double>(heads) * units / kEnoughThreads),
                          1, most));
  const auto groups = [&](const Turned& x) {
    return (int64_t{x.heads} + launch.heads_of_thread - 1) / launch.heads_of_thread;
  };
  const int64_t threads_of_token = (groups(p.q) + groups(p.k)) * units;
  require(threads_of_token <= std::numeric_limits<int>::max(), "x has too many heads: ", p.q.heads);
  launch.groups_of_q = static_cast<int>(groups(p.q));
  launch.threads_of_token = FastDivide::by(static_cast<int>(threads_of_token));
  launch.units = FastDivide::by(units);
  launch.seqlen = FastDivide::by(static_cast<int>(p.seqlen));
  return true;
}

}  // namespace

// As many launches as keep the number of a thread within 31 bits; nearly always one.
void turn(const Params& params, const Target& target) {
  Params p = params;
  Launch launch{};
  if (!plan(p, launch)) return;
  launch.faults = target.device->mailbox();
  const int64_t tokens = p.batch * p.seqlen;
  const int64_t most = std::numeric_limits<int>::max() / launch.threads_of_token.divisor;
  for (int64_t first = 0; first < tokens; first += most) {
    launch.first_token = static_cast<int>(first);
    launch.threads =
        static_cast<int>(std::min(most, tokens - first)) * launch.threads_of_token.divisor;
    // Those of the first launch look at a sequence each.
    const int64_t lookers = first == 0 ? p.sequences : 0;
    void* args[] = {&p, &launch};
    launch_rows(kernel_of(kernels, p.dtype), std::max<int64_t>(launch.threads, lookers), target,
                args);
  }
}

}  // namespace flash::rotary::sm80
