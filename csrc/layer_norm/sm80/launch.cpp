#include "layer_norm/sm80/launch.h"

#include <algorithm>
#include <limits>

#include "base/cuda_driver/device.h"
#include "base/error.h"
#include "layer_norm/sm80/launch_params.h"

#define FLASH_KERNEL(name, ...) extern "C" const char name##_fatbin[];
#include "generated/sm80_layer_norm_bwd.inc"
#include "generated/sm80_layer_norm_fwd.inc"
#include "generated/sm80_layer_norm_sums.inc"
#undef FLASH_KERNEL

namespace flash::layer_norm::sm80 {
namespace {

#define FLASH_KERNEL(name, ...) {#name, name##_fatbin},
constexpr cuda::KernelImage fwd_kernel[] = {
#include "generated/sm80_layer_norm_fwd.inc"
};
constexpr cuda::KernelImage bwd_kernel[] = {
#include "generated/sm80_layer_norm_bwd.inc"
};
constexpr cuda::KernelImage sums_kernel[] = {
#include "generated/sm80_layer_norm_sums.inc"
};
#undef FLASH_KERNEL

constexpr int kThreads = NormConfig::threads();
constexpr int64_t kMostCtasOfBwd = 216;  // two for each SM of an A100

bool is_made_of_chunks(const TypedMatrix& m) {
  return reinterpret_cast<uintptr_t>(m.ptr) % (kChunk * dtype_bytes(m.dtype)) == 0 &&
         m.row_stride % kChunk == 0;
}

template <class... Matrices>
Launch plan(const NormParams& p, const Target* target, const Matrices&... matrices) {
  constexpr int64_t kMostColumns = 1 << 30;
  require(p.cols <= kMostColumns, "x has too many columns: ", p.cols);
  Launch launch{};
  launch.by_chunks = p.cols % kChunk == 0 && (is_made_of_chunks(matrices) && ...) &&
                     is_made_of_chunks(p.colscale) && is_made_of_chunks(p.weight) &&
                     is_made_of_chunks(p.bias) && is_made_of_chunks(p.weight1) &&
                     is_made_of_chunks(p.bias1);
  launch.lanes = 32;
  while (launch.lanes < kThreads && launch.lanes * kColumnsOfThread < p.cols) launch.lanes *= 2;
  const int64_t tile_columns = launch.lanes * kColumnsOfThread;
  launch.tiles = static_cast<int>((p.cols + tile_columns - 1) / tile_columns);
  if (target != nullptr) launch.faults = target->device->mailbox();
  return launch;
}

Launch plan(const FwdParams& p, const Target& target) {
  return plan(p, &target, p.x0, p.x1, p.residual, p.out, p.out1, p.x);
}
Launch plan(const BwdParams& p, const Target* target) {
  return plan(p, target, p.x, p.dout, p.dout1, p.dx, p.x0, p.dx0, p.dx1, p.dresidual, p.out);
}

int64_t ctas_for_rows(const NormParams& p, const Launch& launch) {
  const int64_t rows_of_cta = kThreads / launch.lanes;
  return (p.rows + rows_of_cta - 1) / rows_of_cta;
}
int bwd_ctas(const BwdParams& p, const Launch& launch) {
  return static_cast<int>(std::min(ctas_for_rows(p, launch), kMostCtasOfBwd));
}

int64_t partial_stride(const BwdParams& p) { return (p.cols + kChunk - 1) / kChunk * kChunk; }

// Rows that CTAs leave of a gradient.
int parts_of(const BwdParams& p, const Launch& launch, int which) {
  if (!gradient(p, which).given()) return 0;
  const bool in_registers = which <= kDBias && launch.tiles == 1;
  return bwd_ctas(p, launch) * (in_registers ? 1 : kThreads / launch.lanes);
}

SumsLaunch plan_sums(const BwdParams& p, const Launch& launch, float* memory) {
  SumsLaunch sums{};
  sums.cols = static_cast<int>(p.cols);
  sums.partials.stride = partial_stride(p);
  for (int i = 0; i < kGradients; ++i) {
    sums.to[i] = gradient(p, i);
    sums.parts[i] = parts_of(p, launch, i);
    if (!sums.to[i].given()) continue;
    sums.partials.of[i] = memory;
    memory += sums.parts[i] * sums.partials.stride;
  }
  return sums;
}

void enqueue(const cuda::KernelImage& kernel, int64_t ctas, const Target& target, void** args) {
  require(ctas <= std::numeric_limits<int>::max(), "the tensors have too many rows for one launch");
  target.device->launch(kernel, {static_cast<unsigned>(ctas), kThreads, 0}, target.stream, args);
}

}  // namespace

size_t workspace_bytes(const BwdParams& p) {
  const Launch launch = plan(p, nullptr);
  int64_t rows = 0;
  for (int i = 0; i < kGradients; ++i) rows += parts_of(p, launch, i);
  return rows * partial_stride(p) * sizeof(float);
}

void fwd(const FwdParams& params, const Workspace&, const Target& target) {
  if (params.rows == 0 || params.cols == 0) return;
  FwdParams p = params;
  Launch launch = plan(p, target);
  void* args[] = {&p, &launch};
  enqueue(*fwd_kernel, ctas_for_rows(p, launch), target, args);
}

void bwd(const BwdParams& params, const Workspace& workspace, const Target& target) {
  if (params.cols == 0) return;
  const size_t needed = workspace_bytes(params);
  require(workspace.bytes >= needed, "workspace_bytes must be at least ", needed, ", got ",
          workspace.bytes);
  BwdParams p = params;
  Launch launch = plan(p, &target);
  SumsLaunch sums = plan_sums(p, launch, static_cast<float*>(workspace.ptr));
  int ctas = bwd_ctas(p, launch);
  if (ctas > 0) {
    void* args[] = {&p, &launch, &sums.partials, &ctas};
    enqueue(*bwd_kernel, ctas, target, args);
  }
  constexpr int kColumnsOfSums = 32;
  const int64_t blocks = (p.cols + kColumnsOfSums - 1) / kColumnsOfSums;
  const bool is_wanted =
      std::any_of(sums.to, sums.to + kGradients, [](const TypedMatrix& to) { return to.given(); });
  void* args[] = {&sums};
  if (is_wanted) enqueue(*sums_kernel, blocks * kGradients, target, args);
}

}  // namespace flash::layer_norm::sm80
