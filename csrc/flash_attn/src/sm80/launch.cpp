// From checked arguments to a launch.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <sstream>

#include "base/cuda_driver/device.h"
#include "sm80/fwd_params.h"
#include "sm80/kernel_list.h"
#include "sm80/sm80_backend.h"
#include "sm80/smem.h"

namespace flash::sm80 {
namespace {

constexpr float kLog2e = 1.4426950408889634f;

MaskClass mask_class(const Flash_fwd_params& p) {
  return p.window_left < 0 && p.window_right < 0 ? MaskClass::kNone : MaskClass::kCausalLocal;
}

const FwdKernel& choose(const Flash_fwd_params& p) {
  const MaskClass mask = mask_class(p);
  const FwdConfig wanted{p.dtype, tile_of(std::max(p.d, p.d_v), mask).head_dim, mask};
  return *std::find_if(kFwdKernels.begin(), kFwdKernels.end(),
                       [&](const FwdKernel& kernel) { return kernel.config == wanted; });
}

// Rows are copied in pieces of 16 bytes. `extents`: [b, rows, heads].
void require_alignment(const Operand& x, const char* name, int64_t head_dim,
                       const std::array<int64_t, 3>& extents) {
  const int64_t strides[] = {x.batch_stride, x.row_stride, x.head_stride};
  bool aligned = reinterpret_cast<uintptr_t>(x.ptr) % kChunkBytes == 0;
  for (int i = 0; i < 3; ++i) aligned &= extents[i] <= 1 || strides[i] % kChunkElements == 0;
  if (head_dim % kChunkElements == 0 && aligned) return;
  std::ostringstream sentence;
  sentence << "CUDA kernels take head dimensions that are multiples of 8 and rows that start at "
              "multiples of 16 bytes: "
           << name;
  if (head_dim % kChunkElements != 0) {
    sentence << " has head dimension " << head_dim << " (pad it with zeros)";
  } else {
    sentence << " has a row that does not";
  }
  throw ApiError(FLASH_ATTN_UNSUPPORTED, sentence.str());
}

FwdLaunch plan(const Flash_fwd_params& p, const Tile& tile, int64_t l2_cache_bytes) {
  const int64_t m_blocks = (p.seqlen_q + tile.m - 1) / tile.m, heads = p.b * p.h;
  require(m_blocks * heads <= std::numeric_limits<int>::max(),
          "batch_size * num_heads * seqlen_q is too large");
  FwdLaunch launch{};
  launch.heads = static_cast<int>(p.h);
  launch.group = static_cast<int>(p.h / p.h_k);
  const int64_t kv_bytes = p.seqlen_k * (p.d + p.d_v) * dtype_bytes(p.dtype);
  // Half of the cache: queries and outputs pass through it too.
  launch.scheduler = {static_cast<int>(m_blocks), static_cast<int>(heads),
                      section_of(heads, launch.group, kv_bytes, l2_cache_bytes / 2)};
  launch.negate_q = p.scale_softmax < 0.f;
  launch.scale = std::max(std::fabs(p.scale_softmax), std::numeric_limits<float>::min());
  launch.scale_log2 = std::max(launch.scale * kLog2e, std::numeric_limits<float>::min());
  return launch;
}

}  // namespace

void mha_fwd(const Flash_fwd_params& p) {
  if (p.b == 0 || p.seqlen_q == 0) return;
  require_alignment(p.q, "q", p.d, {p.b, p.seqlen_q, p.h});
  require_alignment(p.o, "out", p.d_v, {p.b, p.seqlen_q, p.h});
  if (p.seqlen_k > 0) {
    require_alignment(p.k, "k", p.d, {p.b, p.seqlen_k, p.h_k});
    require_alignment(p.v, "v", p.d_v, {p.b, p.seqlen_k, p.h_k});
  }
  const FwdKernel& kernel = choose(p);
  FwdParams params{p, p, p};
  FwdLaunch launch = plan(p, tile_of(kernel.config.head_dim, kernel.config.mask),
                          p.target.device->l2_cache_bytes());
  void* args[] = {&params, &launch};
  p.target.device->launch(
      kernel.image,
      {static_cast<unsigned>(launch.scheduler.tiles()), static_cast<unsigned>(kernel.threads),
       static_cast<unsigned>(kernel.shared_bytes)},
      p.target.stream, args);
}

}  // namespace flash::sm80
