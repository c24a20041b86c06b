// Cross entropy on CUDA: a CTA owns a row. Each logit is read once, and in the backward its
// gradient written once: memory is the bound.
//
// A row need not start at a multiple of 16 bytes. The elements ahead of the first such address and
// those after the last whole chunk are read one by one, what is between them by chunks of 16 bytes.
// Forward: every thread keeps the state of the elements that it reads; the states of a warp, then
// those of the warps, are merged in a fixed order.
#pragma once

#include "base/ptx/elements.h"
#include "base/ptx/global_memory.h"
#include "base/ptx/special_registers.h"
#include "base/row_config.h"
#include "base/static_for.h"
#include "xentropy/row_state.h"
#include "xentropy/sm80/launch_params.h"

namespace flash::xentropy::sm80 {

FLASH_DEVICE float exp(float x) { return ptx::ex2(x * 1.4426950408889634f); }

// The state of `count` classes.
struct Part {
  RowState state;
  int count = 0;

  template <int kCount>
  FLASH_DEVICE void add(const float (&z)[kCount]) {
    float largest = state.max;
#pragma unroll
    for (const float x : z) largest = fmaxf(largest, x);
    if (largest > state.max) state.raise(largest, count);
    const float anchor = state.anchor();
#pragma unroll
    for (const float x : z) {
      state.centred += x - anchor;
      state.sum += exp(x - anchor);
    }
    count += kCount;
  }

  FLASH_DEVICE void merge(Part other) {
    const float larger = fmaxf(state.max, other.state.max);
    state.raise(larger, count);
    other.state.raise(larger, other.count);
    state.sum += other.state.sum;
    state.centred += other.state.centred;
    count += other.count;
  }

  FLASH_DEVICE Part partner(int distance) const {
    const auto of = [=](auto x) { return __shfl_xor_sync(0xffffffffu, x, distance); };
    return {{of(state.max), of(state.sum), 0.f, of(state.centred)}, of(count)};
  }
};

// The label of the CTA's row.
struct Label {
  bool ignored;
  int64_t column;  // of logits, if it is one of them

  FLASH_DEVICE Label(const Params& p, const Launch& launch, int row) {
    const Options& o = p.options;
    const int64_t label = p.labels[row];
    const bool is_class = label >= 0 && label < o.num_classes;
    ignored = label == o.ignore_index || !is_class;
    column = label - o.class_start;
    if (label != o.ignore_index && !is_class && threadIdx.x == 0)
      ptx::store_relaxed_sys(launch.faults + static_cast<int>(IndexTensor::kLabels), 1);
  }
};

// Where the chunks of a row lie.
template <Dtype kDtype>
struct Split {
  static constexpr int kBytes = dtype_bytes(kDtype), kChunk = ptx::kElementsOfChunk<kDtype>;
  int head, chunks, cols;

  FLASH_DEVICE Split(const char* row, int64_t columns) : cols(static_cast<int>(columns)) {
    const int to_boundary = static_cast<int>(-reinterpret_cast<uintptr_t>(row) % 16) / kBytes;
    head = min(to_boundary, cols);
    chunks = (cols - head) / kChunk;
  }

  // By elements alone, where another tensor's row lies differently.
  FLASH_DEVICE void fit(const char* row, const char* other) {
    if ((reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(other)) % 16 == 0) return;
    head = cols;
    chunks = 0;
  }

  // Calls body(first column, number of columns as a constant) for this thread's share.
  template <int kThreads, class Body>
  FLASH_DEVICE void for_pieces(const Body& body) const {
    for (int i = threadIdx.x; i < head; i += kThreads) body(i, Constant<1>{});
#pragma unroll 2
    for (int i = threadIdx.x; i < chunks; i += kThreads)
      body(head + i * kChunk, Constant<kChunk>{});
    for (int i = head + chunks * kChunk + threadIdx.x; i < cols; i += kThreads)
      body(i, Constant<1>{});
  }
};

// z of kCount columns.
template <Dtype kDtype, int kCount>
FLASH_DEVICE void load(float (&z)[kCount], const char* row, int64_t column, float scale) {
  ptx::load_elements<kDtype>(z, row + column * dtype_bytes(kDtype));
#pragma unroll
  for (float& x : z) x *= scale;
}

template <RowConfig C>
FLASH_DEVICE Part state_of_columns(const Params& p, const char* row) {
  Part part;
  Split<C.dtype>(row, p.cols)
      .template for_pieces<C.threads()>([&]<int kCount>(int column, Constant<kCount>) {
        float z[kCount];
        load<C.dtype>(z, row, column, p.options.logit_scale);
        part.add(z);
      });
  return part;
}

// Thread 0 gets the state of all threads' parts.
template <RowConfig C>
FLASH_DEVICE Part merge_parts(Part part) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) part.merge(part.partner(distance));
  constexpr int kWarps = C.threads() / 32;
  __shared__ Part parts[kWarps];
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
  __syncthreads();
  part = parts[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) part.merge(parts[warp]);
  return part;
}

FLASH_DEVICE void store(const Params& p, int row, const RowState& s, const Losses& losses) {
  reinterpret_cast<RowState*>(p.state)[row] = s;
  if (p.losses == nullptr) return;
  p.losses[row] = losses.loss;
  p.z_losses[row] = losses.z_loss;
}

template <RowConfig C>
FLASH_DEVICE void xentropy_fwd(const Params& p, const Launch& launch) {
  const int row = ptx::read_ctaid_x();
  const Label label(p, launch, row);
  if (label.ignored) {
    if (threadIdx.x == 0) store(p, row, ignored_row(), {});
    return;
  }
  const char* logits = p.logits.row(row, dtype_bytes(C.dtype));
  Part part;
  if (p.precomputed_lse == nullptr) part = merge_parts<C>(state_of_columns<C>(p, logits));
  if (threadIdx.x != 0) return;

  RowState s = part.state;
  if (p.precomputed_lse != nullptr) s = {p.precomputed_lse[row], 1.f, 0.f, 0.f};
  if (p.classes_before > 0) {
    const RowState before = reinterpret_cast<const RowState*>(p.state)[row];
    part.merge({before, static_cast<int>(p.classes_before)});
    s = part.state;
    s.label = before.label;
  }
  if (label.column >= 0 && label.column < p.cols) {
    float z[1];
    load<C.dtype>(z, logits, label.column, p.options.logit_scale);
    s.label = z[0];
  }
  store(p, row, s, losses_of(s, p.options));
}

template <RowConfig C>
FLASH_DEVICE void xentropy_bwd(const Params& p, const Launch& launch) {
  const int row = ptx::read_ctaid_x();
  const Label label(p, launch, row);
  const char* logits = p.logits.row(row, dtype_bytes(C.dtype));
  char* dlogits = p.dlogits.row(row, dtype_bytes(C.dtype));
  Split<C.dtype> split(dlogits, p.cols);
  if (label.ignored) {
    split.template for_pieces<C.threads()>([&]<int kCount>(int column, Constant<kCount>) {
      const float zeros[kCount] = {};
      ptx::store_elements<C.dtype>(dlogits + int64_t{column} * dtype_bytes(C.dtype), zeros);
    });
    return;
  }
  split.fit(logits, dlogits);
  const RowState s = reinterpret_cast<const RowState*>(p.state)[row];
  const Gradient g = gradient_of(s, p.options, p.dlosses[row]);
  split.template for_pieces<C.threads()>([&]<int kCount>(int column, Constant<kCount>) {
    float z[kCount];
    load<C.dtype>(z, logits, column, p.options.logit_scale);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float shift = column + i == label.column ? g.base + g.at_label : g.base;
      z[i] = fmaf(exp(z[i] - g.anchor), g.slope, shift);
    }
    ptx::store_elements<C.dtype>(dlogits + int64_t{column} * dtype_bytes(C.dtype), z);
  });
}

}  // namespace flash::xentropy::sm80
