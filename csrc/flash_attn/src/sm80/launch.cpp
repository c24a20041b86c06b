// From checked arguments to a launch.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>

#include "cuda_driver/emulated.h"
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

// Of the smallest range of memory that holds x, [b, rows, heads, d].
cuda::HostRange memory_of(const Operand& x, int64_t b, int64_t rows, int64_t heads, int64_t d) {
  const char* begin = static_cast<const char*>(x.ptr);
  if (b == 0 || rows == 0 || heads == 0) return {begin, begin};
  const int64_t last =
      (b - 1) * x.batch_stride + (rows - 1) * x.row_stride + (heads - 1) * x.head_stride + d;
  return {begin, begin + last * 2};
}

cuda::HostRange memory_of_lse(const Flash_fwd_params& p) {
  if (p.softmax_lse == nullptr) return {nullptr, nullptr};
  const int64_t last = (p.b - 1) * p.lse_batch_stride + (p.h - 1) * p.lse_head_stride + p.seqlen_q;
  return {reinterpret_cast<const char*>(p.softmax_lse),
          reinterpret_cast<const char*>(p.softmax_lse + last)};
}

FwdLaunch plan(const Flash_fwd_params& p, const Tile& tile, int64_t l2_cache_bytes) {
  const int64_t m_blocks = (p.seqlen_q + tile.m - 1) / tile.m, heads = p.b * p.h;
  require(m_blocks * heads <= std::numeric_limits<int>::max(),
          "batch_size * num_heads * seqlen_q is too large");
  FwdLaunch launch{};
  launch.heads = static_cast<int>(p.h);
  launch.group = static_cast<int>(p.h / p.h_k);
  const int64_t kv_bytes = p.seqlen_k * (p.d + p.d_v) * 2;
  // Half of the cache: queries and outputs pass through it too.
  launch.scheduler = {static_cast<int>(m_blocks), static_cast<int>(heads),
                      section_of(heads, launch.group, kv_bytes, l2_cache_bytes / 2)};
  launch.negate_q = p.scale_softmax < 0.f;
  launch.scale = std::max(std::fabs(p.scale_softmax), std::numeric_limits<float>::min());
  launch.scale_log2 = std::max(launch.scale * kLog2e, std::numeric_limits<float>::min());
  return launch;
}

void enqueue(const Flash_fwd_params& p, cuda::Device& device, void* stream) {
  if (device.compute_capability() < kMinComputeCapability)
    throw ApiError(FLASH_ATTN_UNSUPPORTED,
                   "CUDA kernels need compute capability 8.0 or newer: device " +
                       std::to_string(device.ordinal()) + " has " +
                       std::to_string(device.compute_capability() / 10) + "." +
                       std::to_string(device.compute_capability() % 10));
  const FwdKernel& kernel = choose(p);
  FwdLaunch launch =
      plan(p, tile_of(kernel.config.head_dim, kernel.config.mask), device.l2_cache_bytes());
  Flash_fwd_params params = p;
  void* args[] = {&params, &launch};
  device.launch(kernel.image,
                {static_cast<unsigned>(launch.scheduler.tiles()),
                 static_cast<unsigned>(kernel.threads), static_cast<unsigned>(kernel.shared_bytes)},
                stream, args);
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
  if (p.device_type == FLASH_ATTN_CUDA) {
    enqueue(p, cuda::Device::get(cuda::Driver::machine(), p.device_id), p.stream);
    return;
  }
  cuda::Device& device = *cuda::emulated_device();
  cuda::EmulatedCall call(device, {memory_of(p.q, p.b, p.seqlen_q, p.h, p.d),
                                   memory_of(p.k, p.b, p.seqlen_k, p.h_k, p.d),
                                   memory_of(p.v, p.b, p.seqlen_k, p.h_k, p.d_v),
                                   memory_of(p.o, p.b, p.seqlen_q, p.h, p.d_v), memory_of_lse(p)});
  call.run([&] { enqueue(p, device, nullptr); });
}

}  // namespace flash::sm80
