#include "activations/sm80/launch.h"

#include <algorithm>
#include <limits>

#include "activations/sm80/launch_params.h"
#include "base/cuda_driver/row_kernel.h"

#define FLASH_KERNEL(name, ...) extern "C" const char name##_fatbin[];
#include "generated/sm80_activation_bwd.inc"
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

// As many launches as keep the number of a thread within 31 bits; nearly always one.
void launch(std::span<const cuda::RowKernel> kernels, const Params& p, const Target& target) {
  if (p.rows == 0 || p.cols == 0) return;
  const bool by_chunks = is_made_of_chunks(p);
  const int64_t threads_of_row = by_chunks ? p.cols * dtype_bytes(p.dtype) / kChunkBytes : p.cols;
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  require(threads_of_row <= kMost, "x has too many columns: ", p.cols);
  const int64_t most_rows = kMost / threads_of_row;
  for (int64_t first = 0; first < p.rows; first += most_rows) {
    Params part = rows_of(p, first, std::min(most_rows, p.rows - first));
    Launch launch{part.rows * threads_of_row, FastDivide::by(static_cast<int>(threads_of_row)),
                  by_chunks};
    void* args[] = {&part, &launch};
    launch_rows(kernel_of(kernels, p.dtype), launch.threads, target, args);
  }
}

}  // namespace

void fwd(const Params& params, const Target& target) { launch(fwd_kernels, params, target); }
void bwd(const Params& params, const Target& target) { launch(bwd_kernels, params, target); }

}  // namespace flash::activations::sm80
