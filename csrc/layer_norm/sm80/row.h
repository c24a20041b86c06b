// Rows in registers. `lanes` threads have a row, each kColumnsOfThread columns of a tile of it:
// chunks of kChunk columns, or single ones where rows are not made of chunks. Lanes that are
// neighbours have columns that are, so that a warp's accesses are of whole sectors: 8 bytes a
// thread of 16-bit tensors, 16 bytes of fp32. A thread issues all loads of a tensor before it uses
// one.
#pragma once

#include "base/index_tensors.h"
#include "base/ptx/elements.h"
#include "base/ptx/global_memory.h"
#include "base/ptx/special_registers.h"
#include "base/static_for.h"
#include "layer_norm/sm80/launch_params.h"

namespace flash::layer_norm::sm80 {

inline constexpr int kChunks = kColumnsOfThread / kChunk;

// Those of a thread's columns.
struct Values {
  float chunks[kChunks][kChunk];

  FLASH_DEVICE float& operator[](int k) { return chunks[k / kChunk][k % kChunk]; }
  FLASH_DEVICE float operator[](int k) const { return chunks[k / kChunk][k % kChunk]; }
};

// This thread's columns of a tile; of a row that does not exist cols is 0.
struct Columns {
  int first, lane, lanes, cols;
  bool by_chunks;

  FLASH_DEVICE int chunk(int i) const { return first + (i * lanes + lane) * kChunk; }
  FLASH_DEVICE int column(int k) const {
    return by_chunks ? chunk(k / kChunk) + k % kChunk : first + k * lanes + lane;
  }
  FLASH_DEVICE bool has(int k) const { return column(k) < cols; }
};

template <Dtype kDtype>
FLASH_DEVICE void load_row(Values& x, const char* row, const Columns& at) {
  constexpr int kBytes = dtype_bytes(kDtype);
  if (at.by_chunks) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (at.chunk(i) < at.cols)
        ptx::load_elements<kDtype>(x.chunks[i], row + at.chunk(i) * kBytes);
    return;
  }
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) {
    if (!at.has(k)) continue;
    float element[1];
    ptx::load_elements<kDtype>(element, row + at.column(k) * kBytes);
    x[k] = element[0];
  }
}

template <Dtype kDtype>
FLASH_DEVICE void store_row(char* row, const Values& x, const Columns& at) {
  constexpr int kBytes = dtype_bytes(kDtype);
  if (at.by_chunks) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
      if (at.chunk(i) < at.cols)
        ptx::store_elements<kDtype>(row + at.chunk(i) * kBytes, x.chunks[i]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) {
    if (!at.has(k)) continue;
    const float element[1] = {x[k]};
    ptx::store_elements<kDtype>(row + at.column(k) * kBytes, element);
  }
}

// Calls body with the dtype as a constant; a branch that all threads take alike.
template <class Body>
FLASH_DEVICE void with_dtype(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kBFloat16) return body.template operator()<Dtype::kBFloat16>();
  if (dtype == Dtype::kFloat16) return body.template operator()<Dtype::kFloat16>();
  body.template operator()<Dtype::kFloat32>();
}

FLASH_DEVICE void fill(Values& x, float value) {
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) x[k] = value;
}

// `absent` where there is no tensor, 0 in columns that do not exist.
FLASH_DEVICE void load(Values& x, const TypedMatrix& m, int64_t row, const Columns& at,
                       float absent = 0.f) {
  fill(x, m.given() ? 0.f : absent);
  if (!m.given()) return;
  with_dtype(m.dtype, [&]<Dtype kDtype>() { load_row<kDtype>(x, m.row(row), at); });
}
FLASH_DEVICE void store(const TypedMatrix& m, int64_t row, const Values& x, const Columns& at) {
  if (!m.given()) return;
  with_dtype(m.dtype, [&]<Dtype kDtype>() { store_row<kDtype>(m.row(row), x, at); });
}

FLASH_DEVICE void load_weight(Values& w, const NormParams& p, const TypedMatrix& m,
                              const Columns& at) {
  const bool plus_one = m.given() && p.zero_centered_weight;
  load(w, m, 0, at, 1.f);
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) w[k] += plus_one ? 1.f : 0.f;
}

FLASH_DEVICE float scale_of(const NormParams& p, int64_t row) {
  if (p.rowscale == nullptr) return p.rowscale_const;
  float scale[1];
  with_dtype(p.rowscale_dtype, [&]<Dtype kDtype>() {
    ptx::load_elements<kDtype>(scale,
                               static_cast<const char*>(p.rowscale) + row * dtype_bytes(kDtype));
  });
  return p.rowscale_const * scale[0];
}

// Row that an entry of an index tensor names; -1: none, or one out of range, which is reported.
FLASH_DEVICE int64_t checked_place(const int32_t* subset, int64_t row, int64_t targets,
                                   uint32_t* faults, IndexTensor tensor) {
  const int64_t place = place_of(subset, row);
  if (place >= -1 && place < targets) return place;
  ptx::store_relaxed_sys(faults + static_cast<int>(tensor), 1);
  return -1;
}

// ------------------------------------------------------------------------------------------------
// Dropout

// 16 random bits of a column.
FLASH_DEVICE uint32_t bits_of(const Philox4& random, int column) {
  const int word = column % KeepRule::kColumns / 2;
  const uint32_t low = word % 2 == 0 ? random.x[0] : random.x[1];
  const uint32_t high = word % 2 == 0 ? random.x[2] : random.x[3];
  return (word < 2 ? low : high) >> (column % 2 * 16) & 0xffffu;
}

FLASH_DEVICE Philox4 random_of(const KeepRule& rule, Branch branch, int64_t row, int column) {
  return philox_4x32_7(
      rule.key, {{static_cast<uint32_t>(column / KeepRule::kColumns), static_cast<uint32_t>(row),
                  static_cast<uint32_t>(branch), rule.offset}});
}

// Drops or rescales a row of a branch; what it kept goes to mask, a byte a column, if it is given.
FLASH_DEVICE void drop(Values& x, const KeepRule& rule, Branch branch, int64_t row,
                       const Columns& at, const Matrix& mask) {
  char* const mask_row = mask.ptr == nullptr ? nullptr : mask.row(row, 4);
  Philox4 random;
#pragma unroll
  for (int k = 0; k < kColumnsOfThread; ++k) {
    const int column = at.column(k);
    if (!at.by_chunks || k % kChunk == 0) random = random_of(rule, branch, row, column);
    const bool keeps = bits_of(random, column) < rule.threshold;
    x[k] = keeps ? x[k] * rule.rescale : 0.f;
    if (mask_row != nullptr && column < at.cols) mask_row[column] = keeps;
  }
}

// ------------------------------------------------------------------------------------------------
// Sums

// The totals of each row's lanes, in all of them; all threads of the CTA come.
template <int kCount>
FLASH_DEVICE void sum_lanes(float (&sums)[kCount], int lanes) {
  constexpr int kWarps = NormConfig::threads() / 32;
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lanes == 32) return;
  __shared__ float of_warps[kWarps][kCount];
  const int warp = threadIdx.x / 32, warps = lanes / 32, first = warp / warps * warps;
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < kCount; ++i) of_warps[warp][i] = sums[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += of_warps[first + w][i];
    sums[i] = total;
  }
  __syncthreads();  // before the next sums
}

}  // namespace flash::layer_norm::sm80
