// The C interface: check, choose where to run, run.
#include "flash_attn/xentropy.h"

#include <array>
#include <cmath>

#include "base/call/guarded.h"
#include "base/call/matrix.h"
#include "base/call/target.h"
#include "base/cpu/isa_units.h"
#include "xentropy/cpu/kernels.h"
#include "xentropy/params.h"
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "xentropy/sm80/launch.h"
#endif

namespace flash::xentropy {
namespace {

constexpr const char* kShape = "(rows, classes)";
constexpr const char* kDtypes = "logits must be fp16, bf16 or fp32";

auto written_by(const flash_attn_xentropy_fwd_args& a) {
  return std::array{Region{"state", a.state}, Region{"losses", a.losses},
                    Region{"z_losses", a.z_losses}};
}
auto read_by(const flash_attn_xentropy_fwd_args& a) {
  return std::array{Region{"logits", a.logits}, Region{"labels", a.labels},
                    Region{"precomputed_lse", a.precomputed_lse}};
}
auto written_by(const flash_attn_xentropy_bwd_args& a) {
  return std::array{Region{"dlogits", a.dlogits}};
}
auto read_by(const flash_attn_xentropy_bwd_args& a) {
  return std::array{Region{"logits", a.logits}, Region{"dlosses", a.dlosses},
                    Region{"labels", a.labels}, Region{"state", a.state}};
}

float* check_statistics(const Arg& x, const Arg& logits, std::initializer_list<Dim> dims) {
  check_fp32(x, logits, dims);
  require(is_contiguous(x), x.name, " must be contiguous");
  return static_cast<float*>(x.t->data);
}

float* check_state(const Arg& x, const Arg& logits) {
  float* state = check_statistics(x, logits, {{"rows", logits.size(0)}, {"4", 4}});
  require(reinterpret_cast<uintptr_t>(state) % 16 == 0, "state must be aligned to 16 bytes");
  return state;
}

float* check_vector(const Arg& x, const Arg& logits) {
  return check_statistics(x, logits, {{"rows", logits.size(0)}});
}

Labels check_labels(const Arg& x, const Arg& logits) {
  require(x.given(), "labels must be given");
  const bool is_int64 = x.t->dtype == FLASH_ATTN_INT64;
  require(is_int64 || x.t->dtype == FLASH_ATTN_INT32, "labels must have dtype int32 or int64, got ",
          dtype_name(x));
  check_device(x, logits);
  check_shape(x, {{"rows", logits.size(0)}});
  require(is_contiguous(x), "labels must be contiguous");
  return {x.t->data, is_int64};
}

// A number that fp32 holds.
float check_number(const char* name, double x) {
  const auto number = static_cast<float>(x);
  require(std::isfinite(number), name, " must be a finite number, got ", x);
  return number;
}

template <class Args>
Options check_options(const Args& a, int64_t cols) {
  require(a.label_smoothing >= 0 && a.label_smoothing <= 1, "label_smoothing must be 0 to 1, got ",
          a.label_smoothing);
  require(a.class_start >= 0 && cols <= a.num_classes && a.class_start <= a.num_classes - cols,
          "the classes ", a.class_start, " to ", a.class_start + cols - 1,
          " of logits must be among num_classes = ", a.num_classes);
  return {static_cast<float>(a.label_smoothing),
          check_number("logit_scale", a.logit_scale),
          check_number("lse_square_scale", a.lse_square_scale),
          a.ignore_index,
          a.class_start,
          a.num_classes};
}

// What forward and backward read alike.
template <class Args>
Params check_inputs(const Args& a) {
  const Arg logits{"logits", a.logits};
  check_view(logits, 2, kShape);
  check_device_of_q(logits);
  Params p{};
  p.dtype = check_float_dtype(logits, kDtypes);
  p.rows = logits.size(0);
  p.cols = logits.size(1);
  p.logits = check_matrix(logits);
  p.labels = check_labels({"labels", a.labels}, logits);
  p.options = check_options(a, p.cols);
  p.state = check_state({"state", a.state}, logits);
  return p;
}

const float* check_precomputed_lse(const flash_attn_xentropy_fwd_args& a) {
  if (a.precomputed_lse == nullptr) return nullptr;
  require(a.logit_scale == 1 && a.label_smoothing == 0,
          "precomputed_lse takes logit_scale = 1 and label_smoothing = 0");
  require(a.classes_before == 0, "precomputed_lse takes all classes of a state at once");
  return check_vector({"precomputed_lse", a.precomputed_lse}, {"logits", a.logits});
}

Params check(const flash_attn_xentropy_fwd_args& a) {
  Params p = check_inputs(a);
  const Arg logits{"logits", a.logits};
  require(a.classes_before >= 0, "classes_before must not be negative, got ", a.classes_before);
  p.classes_before = a.classes_before;
  p.precomputed_lse = check_precomputed_lse(a);
  require((a.losses == nullptr) == (a.z_losses == nullptr),
          "losses and z_losses must be given together");
  if (a.losses != nullptr) {
    p.losses = check_vector({"losses", a.losses}, logits);
    p.z_losses = check_vector({"z_losses", a.z_losses}, logits);
  }
  check_written(written_by(a), read_by(a));
  return p;
}

Params check(const flash_attn_xentropy_bwd_args& a) {
  Params p = check_inputs(a);
  const Arg logits{"logits", a.logits};
  p.dlosses = check_vector({"dlosses", a.dlosses}, logits);
  p.dlogits = check_matrix_like({"dlogits", a.dlogits}, logits);
  check_written(written_by(a), read_by(a));
  return p;
}

// Of a call that the host sees the memory of.
void check_label_values(const Params& p) {
  const Options& o = p.options;
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t label = p.labels[row];
    require((label >= 0 && label < o.num_classes) || label == o.ignore_index,
            "labels must be 0 to ", o.num_classes - 1, " or ignore_index = ", o.ignore_index,
            ", but that of row ", row, " is ", label);
  }
}

#if defined(FLASH_ATTN_HAVE_CUDA)
constexpr auto kCudaFwd = sm80::fwd, kCudaBwd = sm80::bwd;
#else
constexpr void (*kCudaFwd)(const Params&, const Target&) = nullptr;
constexpr auto kCudaBwd = kCudaFwd;
#endif

template <class Args>
flash_attn_status call(const Args* args, void (*cpu::Kernels::*on_cpu)(const Params&),
                       void (*on_cuda)(const Params&, const Target&)) {
  return guarded([&] {
    require_pointer(args, "args");
    const Params p = check(*args);
    const Target target = target_of(*args->logits, args->stream);
    if (target.device_type == FLASH_ATTN_CPU) {
      check_label_values(p);
      return (FLASH_CURRENT_UNIT(cpu::kernels).*on_cpu)(p);
    }
    require_cuda_kernels(target);
    run_kernels(target, written_by(*args), read_by(*args), {}, [&] { on_cuda(p, target); });
  });
}

}  // namespace
}  // namespace flash::xentropy

using flash::xentropy::cpu::Kernels;

flash_attn_status flash_attn_xentropy_fwd(const flash_attn_xentropy_fwd_args* args) {
  return flash::xentropy::call(args, &Kernels::fwd, flash::xentropy::kCudaFwd);
}

flash_attn_status flash_attn_xentropy_bwd(const flash_attn_xentropy_bwd_args* args) {
  return flash::xentropy::call(args, &Kernels::bwd, flash::xentropy::kCudaBwd);
}
