// Rotary embedding on the CPU: each element is read once and written once, so that memory is the
// bound. A task is a piece of the tokens with all their heads, for which the rows of the tables
// stay in the cache.
#pragma once

#include <algorithm>

#include "base/cpu/parallel.h"
#include "base/cpu/row_access.h"
#include "base/cpu/scratch.h"
#include "rotary/positions.h"

namespace flash::rotary::cpu::FLASH_ATTN_ISA {

using namespace flash::cpu::FLASH_ATTN_ISA;  // NOLINT(google-build-using-namespace)

// First and second elements of a vector of pairs.
struct Pairs {
  Vec first, second;
};

FLASH_INLINE Pairs turned(const Pairs& x, Vec cos, Vec sin) {
  return {x.first * cos - x.second * sin, x.second * cos + x.first * sin};
}

template <int... kLane>
FLASH_INLINE Pairs split(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return {__builtin_shufflevector(a, b, (2 * kLane)...),
          __builtin_shufflevector(a, b, (2 * kLane + 1)...)};
}
template <int... kLane>
FLASH_INLINE Pairs join(const Pairs& x, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kWidth / 2;
  return {__builtin_shufflevector(x.first, x.second, (kLane / 2 + kLane % 2 * kWidth)...),
          __builtin_shufflevector(x.first, x.second, (kHalf + kLane / 2 + kLane % 2 * kWidth)...)};
}

// A head whose pairs are i and i + half.
template <Dtype T>
struct Halves {
  char* ptr;
  int64_t half;

  template <class N>
  FLASH_INLINE Pairs load(int64_t i, N n) const {
    const RowIn<T> row{ptr, 0.f};
    return {load_from(row, i, n), load_from(row, half + i, n)};
  }
  template <class N>
  FLASH_INLINE void store(int64_t i, N n, const Pairs& x) const {
    const RowOut<T> row{ptr};
    store_to(row, i, n, x.first);
    store_to(row, half + i, n, x.second);
  }
};

// One whose pairs are 2 i and 2 i + 1.
template <Dtype T>
struct Interleaved {
  char* ptr;
  int64_t half;
  static constexpr std::make_integer_sequence<int, kWidth> kLanes{};

  FLASH_INLINE Pairs load(int64_t i, Constant<kWidth>) const {
    return split(load_as_float<T>(ptr, 2 * i), load_as_float<T>(ptr, 2 * i + kWidth), kLanes);
  }
  FLASH_INLINE Pairs load(int64_t i, int n) const {
    return split(load_tail<T>(ptr, 2 * i, std::min(2 * n, kWidth)),
                 load_tail<T>(ptr, 2 * i + kWidth, std::max(2 * n - kWidth, 0)), kLanes);
  }
  FLASH_INLINE void store(int64_t i, Constant<kWidth>, const Pairs& x) const {
    const auto [low, high] = join(x, kLanes);
    store_from_float<T>(ptr, 2 * i, low);
    store_from_float<T>(ptr, 2 * i + kWidth, high);
  }
  FLASH_INLINE void store(int64_t i, int n, const Pairs& x) const {
    const auto [low, high] = join(x, kLanes);
    store_tail<T>(ptr, 2 * i, std::min(2 * n, kWidth), low);
    store_tail<T>(ptr, 2 * i + kWidth, std::max(2 * n - kWidth, 0), high);
  }
};

template <Dtype TTable, class Head>
FLASH_INLINE void turn_head(const Head& in, const Head& out, const RowIn<TTable>& cos,
                            const RowIn<TTable>& sin, float sign) {
  for_vectors(0, in.half, [&](int64_t i, auto n) {
    const Vec c = load_from(cos, i, n), s = load_from(sin, i, n) * sign;
    out.store(i, n, turned(in.load(i, n), c, s));
  });
}

// Heads of one token; `row` of the tables, -1: they stay as they are.
template <Dtype T, Dtype TTable, template <Dtype> class Head>
FLASH_INLINE void turn_token(const Params& p, const Turned& x, int64_t batch, int64_t t,
                             int64_t row) {
  constexpr int kBytes = dtype_bytes(T);
  if (row < 0 && x.in_place) return;
  const int64_t turned_bytes = row < 0 ? 0 : int64_t{p.rotary_dim} * kBytes;
  const int64_t rest_bytes = int64_t{p.head_dim} * kBytes - turned_bytes;
  const auto cos = row_in<TTable>(x.cos, std::max<int64_t>(row, 0), 0.f);
  const auto sin = row_in<TTable>(x.sin, std::max<int64_t>(row, 0), 0.f);
  const float sign = p.conjugate ? -1.f : 1.f;
  char* in = x.in.token(batch, t, kBytes);
  char* out = x.out.token(batch, t, kBytes);
  for (int h = 0; h < x.heads; ++h) {
    if (row >= 0)
      turn_head(Head<T>{in, p.rotary_dim / 2}, Head<T>{out, p.rotary_dim / 2}, cos, sin, sign);
    if (!x.in_place) std::memcpy(out + turned_bytes, in + turned_bytes, rest_bytes);
    in += x.in.head_stride * kBytes;
    out += x.out.head_stride * kBytes;
  }
}

template <Dtype T, Dtype TTable, template <Dtype> class Head>
inline void turn_tokens(const Params& p) {
  constexpr int64_t kElements = 16384;  // of a task, about
  const int64_t of_token = int64_t{p.q.heads + p.k.heads} * p.head_dim;
  const int64_t tokens = p.batch * p.seqlen;
  const int64_t piece = std::max<int64_t>(kElements / std::max<int64_t>(of_token, 1), 1);
  const int threads =
      flash::cpu::threads_for(8. * static_cast<double>(tokens) * static_cast<double>(of_token));
  parallel_for((tokens + piece - 1) / piece, threads, [&](int64_t task, int) {
    const int64_t end = std::min((task + 1) * piece, tokens);
    for (int64_t i = task * piece; i < end; ++i) {
      const int64_t batch = i / p.seqlen, t = i % p.seqlen;
      const int64_t row = table_row(p, batch, t);
      turn_token<T, TTable, Head>(p, p.q, batch, t, row);
      turn_token<T, TTable, Head>(p, p.k, batch, t, row);
    }
  });
}

inline void turn(const Params& p) {
  with_dtype(p.dtype, [&]<Dtype T>() {
    const auto with_tables = [&]<Dtype TTable>() {
      p.interleaved ? turn_tokens<T, TTable, Interleaved>(p) : turn_tokens<T, TTable, Halves>(p);
    };
    if (p.table_dtype == T) return with_tables.template operator()<T>();
    with_tables.template operator()<Dtype::kFloat32>();
  });
}

}  // namespace flash::rotary::cpu::FLASH_ATTN_ISA
