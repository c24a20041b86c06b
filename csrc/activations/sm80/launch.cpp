#include "activations/sm80/launch.h"

#include <algorithm>
#include <limits>

#include "activations/sm80/launch_params.h"
#include "base/cuda_driver/row_kernel.h"

#define FLASH_KERNEL(name, ...) extern "C" const char name##_fatbin[];
#include "generated/sm80_activation_bwd.inc"
#include "generated/sm80_activation_dbias.inc"
#include "generated/sm80_activation_fwd.inc"
#undef FLASH_KERNEL

namespace flash::activations::sm80 {
namespace {

#define FLASH_KERNEL(name, ...) cuda::RowKernel{__VA_ARGS__, {#name, name##_fatbin}},
constexpr cuda::RowKernel fwd_kernels[] = {
#include "generated/sm80_activation_fwd.inc"
};
constexpr cuda::RowKernel bwd_kernels[] = {
#include "generated/sm80_activation_bwd.inc"
};
constexpr cuda::RowKernel dbias_kernels[] = {
#include "generated/sm80_activation_dbias.inc"
};
#undef FLASH_KERNEL

constexpr int kChunkBytes = 16;

bool is_made_of_chunks(const Params& p) {
  const int64_t chunk = kChunkBytes / dtype_bytes(p.dtype);
  bool is = p.cols % chunk == 0;
  for (const Matrix& m : {p.x, p.bias, p.y, p.out, p.dout, p.dx, p.dy})
    is = is && reinterpret_cast<uintptr_t>(m.ptr) % kChunkBytes == 0 && m.row_stride % chunk == 0;
  return is;
}

// `count` rows of all tensors, from row `first` on.
Params rows_of(Params p, int64_t first, int64_t count) {
  for (Matrix* m : {&p.x, &p.bias, &p.y, &p.out, &p.dout, &p.dx, &p.dy})
    if (m->ptr != nullptr) m->ptr = m->row(first, dtype_bytes(p.dtype));
  p.rows = count;
  return p;
}

int64_t threads_of_row(const Params& p, bool by_chunks) {
  return by_chunks ? p.cols * dtype_bytes(p.dtype) / kChunkBytes : p.cols;
}

// Long enough that the strips' sums are few beside the rows, short enough that there are threads.
int rows_of_strip(const Params& p) {
  constexpr double kThreads = 1 << 16;
  constexpr int64_t kFewest = 8, kMost = 1 << 20;
  if (p.dbias == nullptr) return 1;
  const double threads =
      static_cast<double>(p.rows) * static_cast<double>(threads_of_row(p, is_made_of_chunks(p)));
  return static_cast<int>(std::clamp(static_cast<int64_t>(threads / kThreads), kFewest, kMost));
}

int64_t strips(const Params& p) {
  const int rows = rows_of_strip(p);
  return (p.rows + rows - 1) / rows;
}

// As many launches as keep the numbers of a thread and of a row within 31 bits; nearly always one.
void launch(std::span<const cuda::RowKernel> kernels, const Params& p, const Target& target,
            float* sums = nullptr) {
  if (p.rows == 0 || p.cols == 0) return;
  const bool by_chunks = is_made_of_chunks(p);
  const int64_t threads = threads_of_row(p, by_chunks);
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  require(threads <= kMost, "x has too many columns: ", p.cols);
  const int64_t rows = rows_of_strip(p), all = strips(p);
  const int64_t most = std::max<int64_t>(kMost / threads / rows, 1);
  for (int64_t first = 0; first < all; first += most) {
    const int64_t count = std::min(most, all - first);
    Params part = rows_of(p, first * rows, std::min(count * rows, p.rows - first * rows));
    Launch launch{count * threads,
                  FastDivide::by(static_cast<int>(threads)),
                  by_chunks,
                  static_cast<int>(rows),
                  static_cast<int>(count),
                  sums == nullptr ? nullptr : sums + first * p.cols};
    void* args[] = {&part, &launch};
    launch_rows(kernel_of(kernels, p.dtype), launch.threads, target, args);
  }
}

// The sums of strips to dbias.
void launch_dbias(const Params& params, const Target& target, float* sums) {
  require(strips(params) <= std::numeric_limits<int>::max(), "x has too many rows: ", params.rows);
  Params p = params;
  Launch launch{};
  launch.threads = p.cols;
  launch.strips = static_cast<int>(strips(p));
  launch.sums = sums;
  void* args[] = {&p, &launch};
  if (p.cols > 0) launch_rows(dbias_kernels[0], launch.threads, target, args);
}

}  // namespace

void fwd(const Params& params, const Target& target, const Workspace&) {
  launch(fwd_kernels, params, target);
}

void bwd(const Params& params, const Target& target, const Workspace& workspace) {
  if (params.dbias == nullptr) return launch(bwd_kernels, params, target);
  float* sums = static_cast<float*>(workspace.ptr);
  launch(bwd_kernels, params, target, sums);
  launch_dbias(params, target, sums);
}

size_t workspace_bytes(const Params& params) {
  return params.dbias == nullptr ? 0 : strips(params) * params.cols * sizeof(float);
}

}  // namespace flash::activations::sm80
