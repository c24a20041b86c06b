// The C interface: check, choose where to run, run.
#include "flash_attn/activations.h"

#include <array>

#include "activations/cpu/kernels.h"
#include "activations/params.h"
#include "base/call/guarded.h"
#include "base/call/matrix.h"
#include "base/call/target.h"
#include "base/cpu/isa_units.h"
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "activations/sm80/launch.h"
#endif

namespace flash::activations {
namespace {

constexpr const char* kShape = "(rows, cols)";
constexpr const char* kDtypes = "activations take fp16, bf16 and fp32";

auto written_by(const flash_attn_activation_fwd_args& a) {
  return std::array{Region{"out", a.out}};
}
auto read_by(const flash_attn_activation_fwd_args& a) {
  return std::array{Region{"x", a.x}, Region{"bias", a.bias}, Region{"y", a.y}};
}
auto written_by(const flash_attn_activation_bwd_args& a) {
  return std::array{Region{"dx", a.dx}, Region{"dy", a.dy}, Region{"dbias", a.dbias}};
}
auto read_by(const flash_attn_activation_bwd_args& a) {
  return std::array{Region{"dout", a.dout}, Region{"x", a.x}, Region{"bias", a.bias},
                    Region{"y", a.y}};
}

// What forward and backward read alike.
template <class Args>
Params check_inputs(const Args& a) {
  const Arg x{"x", a.x}, bias{"bias", a.bias}, y{"y", a.y};
  check_view(x, 2, kShape);
  check_device_of_q(x);
  Params p{};
  p.dtype = check_float_dtype(x, kDtypes);
  require(a.activation >= 0 && a.activation < kFunctions, "activation must be 0 to ",
          kFunctions - 1, ", got ", a.activation);
  p.function = static_cast<Function>(a.activation);
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.x = check_matrix(x);
  if (bias.given()) p.bias = check_vector_like(bias, x);
  if (y.given()) p.y = check_matrix_like(y, x);
  return p;
}

// A contiguous fp32 vector of as many elements as x has columns.
float* check_sums(const Arg& sums, const Arg& x) {
  check_fp32(sums, x, {{"cols", x.size(1)}});
  require(is_contiguous(sums), sums.name, " must be contiguous");
  return static_cast<float*>(sums.t->data);
}

Params check(const flash_attn_activation_fwd_args& a) {
  Params p = check_inputs(a);
  p.out = check_matrix_like({"out", a.out}, {"x", a.x});
  check_written(written_by(a), read_by(a));
  return p;
}

Params check(const flash_attn_activation_bwd_args& a) {
  Params p = check_inputs(a);
  const Arg x{"x", a.x};
  p.dout = check_matrix_like({"dout", a.dout}, x);
  p.dx = check_matrix_like({"dx", a.dx}, x);
  require((a.dy != nullptr) == (a.y != nullptr), "dy must be given where y is, and only there");
  if (a.dy != nullptr) p.dy = check_matrix_like({"dy", a.dy}, x);
  if (a.dbias != nullptr) p.dbias = check_sums({"dbias", a.dbias}, x);
  check_written(written_by(a), read_by(a));
  return p;
}

// One row, if the rows of all tensors follow each other without a gap.
void join_rows(Params& p) {
  if (p.bias.ptr != nullptr || p.dbias != nullptr) return;
  for (const Matrix& m : {p.x, p.y, p.out, p.dout, p.dx, p.dy})
    if (m.ptr != nullptr && m.row_stride != p.cols) return;
  constexpr int64_t kMost = int64_t{1} << 30;
  if (p.rows > kMost / std::max<int64_t>(p.cols, 1)) return;
  p.cols *= p.rows;
  p.rows = 1;
}

#if defined(FLASH_ATTN_HAVE_CUDA)
constexpr auto kCudaFwd = sm80::fwd, kCudaBwd = sm80::bwd;
constexpr size_t (*kCudaBytes)(const Params&) = sm80::workspace_bytes;
#else
constexpr void (*kCudaFwd)(const Params&, const Target&, const Workspace&) = nullptr;
constexpr auto kCudaBwd = kCudaFwd;
constexpr size_t (*kCudaBytes)(const Params&) = nullptr;
#endif

template <class Args>
Params checked(const Args* args) {
  require_pointer(args, "args");
  Params p = check(*args);
  join_rows(p);
  return p;
}

size_t bytes_needed(const Params& p, const Target& target) {
  if (target.device_type == FLASH_ATTN_CPU) return 0;
  require_cuda_kernels(target);
  return kCudaBytes(p);
}

Workspace workspace_of(const flash_attn_activation_fwd_args&) { return {}; }
Workspace workspace_of(const flash_attn_activation_bwd_args& a) {
  return {a.workspace, a.workspace_bytes};
}

void check_workspace(const Workspace& workspace, size_t needed) {
  if (needed == 0) return;
  require(workspace.ptr != nullptr && workspace.bytes >= needed, "the workspace must have ", needed,
          " bytes, has ", workspace.ptr == nullptr ? 0 : workspace.bytes);
}

template <class Args>
flash_attn_status call(const Args* args, void (*cpu::Kernels::*on_cpu)(const Params&),
                       void (*on_cuda)(const Params&, const Target&, const Workspace&)) {
  return guarded([&] {
    const Params p = checked(args);
    const Target target = target_of(*args->x, args->stream);
    if (target.device_type == FLASH_ATTN_CPU) return (FLASH_CURRENT_UNIT(cpu::kernels).*on_cpu)(p);
    require_cuda_kernels(target);
    const Workspace workspace = workspace_of(*args);
    check_workspace(workspace, bytes_needed(p, target));
    run_kernels(target, written_by(*args), read_by(*args), workspace,
                [&] { on_cuda(p, target, workspace); });
  });
}

}  // namespace
}  // namespace flash::activations

using flash::activations::cpu::Kernels;

flash_attn_status flash_attn_activation_fwd(const flash_attn_activation_fwd_args* args) {
  return flash::activations::call(args, &Kernels::fwd, flash::activations::kCudaFwd);
}

flash_attn_status flash_attn_activation_bwd(const flash_attn_activation_bwd_args* args) {
  return flash::activations::call(args, &Kernels::bwd, flash::activations::kCudaBwd);
}

flash_attn_status flash_attn_activation_bwd_workspace_size(
    const flash_attn_activation_bwd_args* args, size_t* bytes) {
  return flash::guarded([&] {
    flash::require_pointer(bytes, "bytes");
    const auto p = flash::activations::checked(args);
    *bytes = flash::activations::bytes_needed(p, flash::target_of(*args->x, args->stream));
  });
}
