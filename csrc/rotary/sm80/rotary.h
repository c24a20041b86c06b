// Rotary embedding on CUDA: a thread owns the pairs of one access in some heads of a token, 16
// bytes of their first elements and 16 of their second, or 16 bytes of interleaved pairs, or one
// pair where heads are not made of chunks; it reads their cos and sin once. Each element is read
// once and written once: memory is the bound.
#pragma once

#include "base/index_tensors.h"
#include "base/ptx/elements.h"
#include "base/ptx/global_memory.h"
#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "base/static_for.h"
#include "rotary/positions.h"
#include "rotary/sm80/launch_params.h"

namespace flash::rotary::sm80 {

// Of one thread.
template <int kPairs>
struct Pairs {
  float first[kPairs], second[kPairs];
};

// Where the elements of pair `pair` of a head lie; one of the next pair follows them.
struct PairPlace {
  int first, second;
};
FLASH_DEVICE PairPlace place_of(const Params& p, int pair) {
  if (p.interleaved) return {2 * pair, 2 * pair + 1};
  return {pair, pair + p.rotary_dim / 2};
}

// One pair, or a chunk of each element of pairs, or one chunk of interleaved pairs.
template <Dtype kDtype, int kPairs>
FLASH_DEVICE void load(Pairs<kPairs>& x, const Params& p, const char* head, int pair) {
  constexpr int kBytes = dtype_bytes(kDtype), kChunk = ptx::kElementsOfChunk<kDtype>;
  const PairPlace place = place_of(p, pair);
  if constexpr (kPairs == 1 || kPairs == kChunk) {
    ptx::load_elements<kDtype>(x.first, head + place.first * kBytes);
    ptx::load_elements<kDtype>(x.second, head + place.second * kBytes);
  } else {
    float chunk[kChunk];
    ptx::load_elements<kDtype>(chunk, head + place.first * kBytes);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) x.first[i] = chunk[2 * i], x.second[i] = chunk[2 * i + 1];
  }
}

template <Dtype kDtype, int kPairs>
FLASH_DEVICE void store(const Pairs<kPairs>& x, const Params& p, char* head, int pair) {
  constexpr int kBytes = dtype_bytes(kDtype), kChunk = ptx::kElementsOfChunk<kDtype>;
  const PairPlace place = place_of(p, pair);
  if constexpr (kPairs == 1 || kPairs == kChunk) {
    ptx::store_elements<kDtype>(head + place.first * kBytes, x.first);
    ptx::store_elements<kDtype>(head + place.second * kBytes, x.second);
  } else {
    float chunk[kChunk];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) chunk[2 * i] = x.first[i], chunk[2 * i + 1] = x.second[i];
    ptx::store_elements<kDtype>(head + place.first * kBytes, chunk);
  }
}

// Of a row of a table.
template <Dtype kDtype, int kPairs>
FLASH_DEVICE void load_table(float (&x)[kPairs], const Params& p, const Matrix& table, int64_t row,
                             int pair) {
  if (p.table_dtype == kDtype) {
    constexpr int kBytes = dtype_bytes(kDtype);
    ptx::load_elements<kDtype>(x, table.row(row, kBytes) + pair * kBytes);
  } else {
    ptx::load_elements<Dtype::kFloat32>(x, table.row(row, 4) + pair * 4);
  }
}

template <int kPairs>
FLASH_DEVICE void turn(Pairs<kPairs>& x, const float (&cos)[kPairs], const float (&sin)[kPairs]) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const float first = x.first[i], second = x.second[i];
    x.first[i] = first * cos[i] - second * sin[i];
    x.second[i] = second * cos[i] + first * sin[i];
  }
}

// This thread's heads of a token.
struct Heads {
  const Turned& of;
  char *in, *out;  // the first
  int count;

  // Calls body(in, out) for each.
  template <int kBytes, class Body>
  FLASH_DEVICE void for_each(const Body& body) const {
    char *from = in, *to = out;
    for (int h = 0; h < count; ++h) {
      body(from, to);
      from += of.in.head_stride * kBytes;
      to += of.out.head_stride * kBytes;
    }
  }
};

template <Dtype kDtype>
FLASH_DEVICE Heads heads_of(const Params& p, const Launch& launch, int64_t batch, int64_t t,
                            int group) {
  constexpr int kBytes = dtype_bytes(kDtype);
  const bool is_q = group < launch.groups_of_q;
  const Turned& x = is_q ? p.q : p.k;
  const int first = (is_q ? group : group - launch.groups_of_q) * launch.heads_of_thread;
  const int left = x.heads - first;
  return {x, x.in.token(batch, t, kBytes) + first * x.in.head_stride * kBytes,
          x.out.token(batch, t, kBytes) + first * x.out.head_stride * kBytes,
          left < launch.heads_of_thread ? left : launch.heads_of_thread};
}

template <Dtype kDtype, int kPairs>
FLASH_DEVICE void turn_heads(const Params& p, const Heads& heads, int64_t row, int pair) {
  constexpr int kBytes = dtype_bytes(kDtype);
  if (row < 0 && heads.of.in_place) return;
  float cos[kPairs], sin[kPairs];
  if (row >= 0) {
    load_table<kDtype>(cos, p, heads.of.cos, row, pair);
    load_table<kDtype>(sin, p, heads.of.sin, row, pair);
    if (p.conjugate)
#pragma unroll
      for (float& x : sin) x = -x;
  }
  heads.for_each<kBytes>([&](const char* in, char* out) {
    Pairs<kPairs> x;
    load<kDtype>(x, p, in, pair);
    if (row >= 0) turn(x, cos, sin);
    store<kDtype>(x, p, out, pair);
  });
}

template <Dtype kDtype, int kElements>
FLASH_DEVICE void copy_heads(const Heads& heads, int element) {
  constexpr int kBytes = dtype_bytes(kDtype);
  if (heads.of.in_place) return;
  heads.for_each<kBytes>([&](const char* in, char* out) {
    float x[kElements];
    ptx::load_elements<kDtype>(x, in + element * kBytes);
    ptx::store_elements<kDtype>(out + element * kBytes, x);
  });
}

// Of accesses of kPairs pairs, or kElements elements that are copied.
template <Dtype kDtype, int kPairs, int kElements>
FLASH_DEVICE void work(const Params& p, const Launch& launch, int thread) {
  const int in_launch = launch.threads_of_token.quotient(thread);
  const int in_token = thread - in_launch * launch.threads_of_token.divisor;
  const int token = launch.first_token + in_launch;
  const int batch = launch.seqlen.quotient(token);
  const int t = token - batch * launch.seqlen.divisor;
  const int group = launch.units.quotient(in_token);
  const int unit = in_token - group * launch.units.divisor;
  const Heads heads = heads_of<kDtype>(p, launch, batch, t, group);
  if (unit < launch.turning_units) {
    turn_heads<kDtype, kPairs>(p, heads, table_row(p, batch, t), unit * kPairs);
  } else {
    copy_heads<kDtype, kElements>(heads, p.rotary_dim + (unit - launch.turning_units) * kElements);
  }
}

FLASH_DEVICE void report(const Launch& launch, IndexTensor tensor) {
  ptx::store_relaxed_sys(launch.faults + static_cast<int>(tensor), 1);
}

FLASH_DEVICE void report_faults(const Params& p, const Launch& launch, int64_t i) {
  if (p.cu_seqlens.ptr == nullptr && p.seqlen_offsets.ptr == nullptr) return;
  const Sequence s = sequence(p, i);
  if (!s.fits) report(launch, IndexTensor::kCuSeqlens);
  if (!s.has_rows) report(launch, IndexTensor::kSeqlenOffsets);
}

template <RowConfig C>
FLASH_DEVICE void rotary(const Params& p, const Launch& launch) {
  constexpr int kChunk = ptx::kElementsOfChunk<C.dtype>;
  const int64_t thread = static_cast<int64_t>(ptx::read_ctaid_x()) * C.threads() + threadIdx.x;
  if (launch.first_token == 0 && thread < p.sequences) report_faults(p, launch, thread);
  if (thread >= launch.threads) return;
  if (!launch.by_chunks) {
    work<C.dtype, 1, 1>(p, launch, static_cast<int>(thread));
  } else if (p.interleaved) {
    work<C.dtype, kChunk / 2, kChunk>(p, launch, static_cast<int>(thread));
  } else {
    work<C.dtype, kChunk, kChunk>(p, launch, static_cast<int>(thread));
  }
}

}  // namespace flash::rotary::sm80
