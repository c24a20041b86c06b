// The apache-tvm-ffi face of libflash_attn: tensors come in as DLPack views, a status other than OK
// goes out as a Python RuntimeError, or MemoryError, with the library's sentence. Arguments are
// checked behind the C interface, not here.
#include <dlpack/dlpack.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "flash_attn/flash_attn.h"

namespace {

using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;
using MaybeTensor = Optional<TensorView>;

flash_attn_dtype to_dtype(DLDataType dtype) {
  if (dtype.lanes != 1) return FLASH_ATTN_OTHER_DTYPE;
  if (dtype.code == kDLFloat && dtype.bits == 16) return FLASH_ATTN_FLOAT16;
  if (dtype.code == kDLFloat && dtype.bits == 32) return FLASH_ATTN_FLOAT32;
  if (dtype.code == kDLBfloat && dtype.bits == 16) return FLASH_ATTN_BFLOAT16;
  if (dtype.code == kDLInt && dtype.bits == 32) return FLASH_ATTN_INT32;
  if (dtype.code == kDLInt && dtype.bits == 64) return FLASH_ATTN_INT64;
  return FLASH_ATTN_OTHER_DTYPE;
}

// Page-locked host memory is host memory; devices that the library does not know become 0, which it
// rejects.
flash_attn_device_type to_device_type(DLDeviceType type) {
  if (type == kDLCPU || type == kDLCUDAHost) return FLASH_ATTN_CPU;
  return type == kDLCUDA ? FLASH_ATTN_CUDA : static_cast<flash_attn_device_type>(0);
}

// A tensor argument of the C interface; converts to a null pointer where Python passed None.
class Tensor {
 public:
  explicit Tensor(const TensorView& view) { set(view); }
  explicit Tensor(const MaybeTensor& view) {
    if (view.has_value()) set(*view);
  }
  operator const flash_attn_tensor*() const {  // NOLINT(google-explicit-constructor)
    return given_ ? &tensor_ : nullptr;
  }

 private:
  void set(const TensorView& view) {
    given_ = true;
    tensor_.data = static_cast<char*>(view.data_ptr()) + view.byte_offset();
    tensor_.dtype = to_dtype(view.dtype());
    tensor_.device_type = to_device_type(view.device().device_type);
    tensor_.device_id = view.device().device_id;
    tensor_.ndim = view.ndim();
    // The library rejects a tensor of more dimensions by its ndim alone.
    const int stored = std::min(tensor_.ndim, FLASH_ATTN_MAX_NDIM);
    for (int i = 0; i < stored; ++i) {
      tensor_.shape[i] = view.size(i);
      tensor_.stride[i] = view.stride(i);
    }
  }

  bool given_ = false;
  flash_attn_tensor tensor_;
};

void check_status(flash_attn_status status) {
  if (status == FLASH_ATTN_OK) return;
  const char* kind = status == FLASH_ATTN_OUT_OF_MEMORY ? "MemoryError" : "RuntimeError";
  throw tvm::ffi::Error(kind, flash_attn_last_error(), "");
}

// Text of the library, where NULL tells that the call failed.
String checked_text(const char* text) {
  if (text == nullptr) check_status(FLASH_ATTN_INVALID_ARGUMENT);
  return text;
}

// Out-of-range numbers stay out of range, for the library to reject.
int32_t saturate(int64_t x) {
  return static_cast<int32_t>(std::clamp<int64_t>(x, std::numeric_limits<int32_t>::min(),
                                                  std::numeric_limits<int32_t>::max()));
}

// The stream that the caller's framework works on now, for the device of `q`; tvm-ffi asks the
// framework when tensors cross.
void* current_stream(const TensorView& q) {
  const DLDevice device = q.device();
  if (device.device_type != kDLCUDA) return nullptr;
  return TVMFFIEnvGetStream(device.device_type, device.device_id);
}

flash_attn_score_args score_args(double softmax_scale, double softcap, bool is_causal,
                                 int64_t window_left, int64_t window_right) {
  flash_attn_score_args score{};
  score.softmax_scale = softmax_scale;
  score.softcap = softcap;
  score.window_left = window_left;
  score.window_right = window_right;
  score.is_causal = is_causal;
  return score;
}

void mha_fwd(TensorView q, TensorView k, TensorView v, TensorView out, MaybeTensor softmax_lse,
             MaybeTensor s_dmask, MaybeTensor rng_state, MaybeTensor alibi_slopes,
             MaybeTensor s_aux, MaybeTensor attn_bias, double p_dropout, double softmax_scale,
             bool is_causal, int64_t window_left, int64_t window_right, double softcap) {
  const Tensor q_t(q), k_t(k), v_t(v), out_t(out), lse_t(softmax_lse), s_dmask_t(s_dmask),
      rng_t(rng_state), alibi_t(alibi_slopes), s_aux_t(s_aux), bias_t(attn_bias);
  flash_attn_fwd_args args{};
  args.q = q_t;
  args.k = k_t;
  args.v = v_t;
  args.out = out_t;
  args.softmax_lse = lse_t;
  args.score = score_args(softmax_scale, softcap, is_causal, window_left, window_right);
  args.score.alibi_slopes = alibi_t;
  args.score.s_aux = s_aux_t;
  args.score.attn_bias = bias_t;
  args.p_dropout = p_dropout;
  args.rng_state = rng_t;
  args.s_dmask = s_dmask_t;
  args.stream = current_stream(q);
  check_status(flash_attn_mha_fwd(&args));
}

void mha_varlen_fwd(TensorView q, TensorView k, TensorView v, TensorView out,
                    MaybeTensor softmax_lse, MaybeTensor s_dmask, MaybeTensor rng_state,
                    MaybeTensor alibi_slopes, MaybeTensor s_aux, MaybeTensor attn_bias,
                    TensorView cu_seqlens_q, TensorView cu_seqlens_k, MaybeTensor seqused_k,
                    MaybeTensor leftpad_k, MaybeTensor block_table, int64_t max_seqlen_q,
                    int64_t max_seqlen_k, double p_dropout, double softmax_scale, bool zero_tensors,
                    bool is_causal, int64_t window_left, int64_t window_right, double softcap,
                    int64_t num_splits) {
  const Tensor q_t(q), k_t(k), v_t(v), out_t(out), lse_t(softmax_lse), s_dmask_t(s_dmask),
      rng_t(rng_state), alibi_t(alibi_slopes), s_aux_t(s_aux), bias_t(attn_bias),
      cu_q_t(cu_seqlens_q), cu_k_t(cu_seqlens_k), seqused_t(seqused_k), leftpad_t(leftpad_k),
      table_t(block_table);
  flash_attn_fwd_args args{};
  args.q = q_t;
  args.k = k_t;
  args.v = v_t;
  args.out = out_t;
  args.softmax_lse = lse_t;
  args.score = score_args(softmax_scale, softcap, is_causal, window_left, window_right);
  args.score.alibi_slopes = alibi_t;
  args.score.s_aux = s_aux_t;
  args.score.attn_bias = bias_t;
  args.p_dropout = p_dropout;
  args.rng_state = rng_t;
  args.s_dmask = s_dmask_t;
  args.cu_seqlens_q = cu_q_t;
  args.cu_seqlens_k = cu_k_t;
  args.seqused_k = seqused_t;
  args.leftpad_k = leftpad_t;
  args.block_table = table_t;
  args.max_seqlen_q = max_seqlen_q;
  args.max_seqlen_k = max_seqlen_k;
  args.zero_tensors = zero_tensors;
  args.num_splits = saturate(num_splits);
  args.stream = current_stream(q);
  check_status(flash_attn_mha_varlen_fwd(&args));
}

void mha_bwd(TensorView dout, TensorView q, TensorView k, TensorView v, TensorView out,
             TensorView softmax_lse, TensorView dq, TensorView dk, TensorView dv,
             TensorView softmax_d, MaybeTensor rng_state, MaybeTensor alibi_slopes,
             MaybeTensor s_aux, MaybeTensor attn_bias, MaybeTensor dlse, MaybeTensor ds_aux,
             MaybeTensor dattn_bias, double p_dropout, double softmax_scale, bool is_causal,
             int64_t window_left, int64_t window_right, double softcap, bool deterministic) {
  const Tensor dout_t(dout), q_t(q), k_t(k), v_t(v), out_t(out), lse_t(softmax_lse), dq_t(dq),
      dk_t(dk), dv_t(dv), softmax_d_t(softmax_d), rng_t(rng_state), alibi_t(alibi_slopes),
      s_aux_t(s_aux), bias_t(attn_bias), dlse_t(dlse), ds_aux_t(ds_aux), dbias_t(dattn_bias);
  flash_attn_bwd_args args{};
  args.dout = dout_t;
  args.q = q_t;
  args.k = k_t;
  args.v = v_t;
  args.out = out_t;
  args.softmax_lse = lse_t;
  args.dq = dq_t;
  args.dk = dk_t;
  args.dv = dv_t;
  args.softmax_d = softmax_d_t;
  args.dlse = dlse_t;
  args.ds_aux = ds_aux_t;
  args.dattn_bias = dbias_t;
  args.score = score_args(softmax_scale, softcap, is_causal, window_left, window_right);
  args.score.alibi_slopes = alibi_t;
  args.score.s_aux = s_aux_t;
  args.score.attn_bias = bias_t;
  args.p_dropout = p_dropout;
  args.rng_state = rng_t;
  args.deterministic = deterministic;
  args.stream = current_stream(q);
  check_status(flash_attn_mha_bwd(&args));
}

void mha_varlen_bwd(TensorView dout, TensorView q, TensorView k, TensorView v, TensorView out,
                    TensorView softmax_lse, TensorView dq, TensorView dk, TensorView dv,
                    TensorView softmax_d, MaybeTensor rng_state, MaybeTensor alibi_slopes,
                    MaybeTensor s_aux, MaybeTensor attn_bias, MaybeTensor dlse, MaybeTensor ds_aux,
                    MaybeTensor dattn_bias, TensorView cu_seqlens_q, TensorView cu_seqlens_k,
                    int64_t max_seqlen_q, int64_t max_seqlen_k, double p_dropout,
                    double softmax_scale, bool zero_tensors, bool is_causal, int64_t window_left,
                    int64_t window_right, double softcap, bool deterministic) {
  const Tensor dout_t(dout), q_t(q), k_t(k), v_t(v), out_t(out), lse_t(softmax_lse), dq_t(dq),
      dk_t(dk), dv_t(dv), softmax_d_t(softmax_d), rng_t(rng_state), alibi_t(alibi_slopes),
      s_aux_t(s_aux), bias_t(attn_bias), dlse_t(dlse), ds_aux_t(ds_aux), dbias_t(dattn_bias),
      cu_q_t(cu_seqlens_q), cu_k_t(cu_seqlens_k);
  flash_attn_bwd_args args{};
  args.dout = dout_t;
  args.q = q_t;
  args.k = k_t;
  args.v = v_t;
  args.out = out_t;
  args.softmax_lse = lse_t;
  args.dq = dq_t;
  args.dk = dk_t;
  args.dv = dv_t;
  args.softmax_d = softmax_d_t;
  args.dlse = dlse_t;
  args.ds_aux = ds_aux_t;
  args.dattn_bias = dbias_t;
  args.score = score_args(softmax_scale, softcap, is_causal, window_left, window_right);
  args.score.alibi_slopes = alibi_t;
  args.score.s_aux = s_aux_t;
  args.score.attn_bias = bias_t;
  args.p_dropout = p_dropout;
  args.rng_state = rng_t;
  args.deterministic = deterministic;
  args.cu_seqlens_q = cu_q_t;
  args.cu_seqlens_k = cu_k_t;
  args.max_seqlen_q = max_seqlen_q;
  args.max_seqlen_k = max_seqlen_k;
  args.zero_tensors = zero_tensors;
  args.stream = current_stream(q);
  check_status(flash_attn_mha_varlen_bwd(&args));
}

void mha_fwd_kvcache(TensorView q, TensorView k_cache, TensorView v_cache, MaybeTensor k,
                     MaybeTensor v, TensorView out, MaybeTensor softmax_lse,
                     MaybeTensor cache_seqlens, MaybeTensor rotary_cos, MaybeTensor rotary_sin,
                     MaybeTensor cache_batch_idx, MaybeTensor cache_leftpad,
                     MaybeTensor block_table, MaybeTensor alibi_slopes, MaybeTensor s_aux,
                     double softmax_scale, bool is_causal, int64_t window_left,
                     int64_t window_right, double softcap, bool is_rotary_interleaved,
                     int64_t num_splits) {
  const Tensor q_t(q), k_cache_t(k_cache), v_cache_t(v_cache), k_t(k), v_t(v), out_t(out),
      lse_t(softmax_lse), seqlens_t(cache_seqlens), cos_t(rotary_cos), sin_t(rotary_sin),
      batch_idx_t(cache_batch_idx), leftpad_t(cache_leftpad), table_t(block_table),
      alibi_t(alibi_slopes), s_aux_t(s_aux);
  flash_attn_kvcache_args args{};
  args.q = q_t;
  args.k_cache = k_cache_t;
  args.v_cache = v_cache_t;
  args.k = k_t;
  args.v = v_t;
  args.out = out_t;
  args.softmax_lse = lse_t;
  args.score = score_args(softmax_scale, softcap, is_causal, window_left, window_right);
  args.score.alibi_slopes = alibi_t;
  args.score.s_aux = s_aux_t;
  args.cache_seqlens = seqlens_t;
  args.rotary_cos = cos_t;
  args.rotary_sin = sin_t;
  args.cache_batch_idx = batch_idx_t;
  args.cache_leftpad = leftpad_t;
  args.block_table = table_t;
  args.is_rotary_interleaved = is_rotary_interleaved;
  args.num_splits = saturate(num_splits);
  args.stream = current_stream(q);
  check_status(flash_attn_mha_fwd_kvcache(&args));
}

void combine(TensorView out_partial, TensorView lse_partial, TensorView out, MaybeTensor lse) {
  const Tensor out_partial_t(out_partial), lse_partial_t(lse_partial), out_t(out), lse_t(lse);
  flash_attn_combine_args args{};
  args.out_partial = out_partial_t;
  args.lse_partial = lse_partial_t;
  args.out = out_t;
  args.lse = lse_t;
  args.stream = current_stream(out);
  check_status(flash_attn_combine(&args));
}

void set_cpu_isa(Optional<String> name) {
  check_status(flash_attn_set_cpu_isa(name.has_value() ? name.value().c_str() : nullptr));
}

void use_emulator(String description, Optional<String> library) {
  check_status(flash_attn_use_emulator(description.c_str(),
                                       library.has_value() ? library.value().c_str() : nullptr));
}

String version() { return flash_attn_version(); }
String cpu_isas() { return flash_attn_cpu_isas(); }
String cpu_isa() { return checked_text(flash_attn_cpu_isa()); }
int64_t cpu_threads() { return flash_attn_cpu_threads(); }
String emulator_counters() { return checked_text(flash_attn_emulator_counters()); }
String kernels() { return flash_attn_kernels(); }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mha_fwd, mha_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mha_varlen_fwd, mha_varlen_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mha_bwd, mha_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mha_varlen_bwd, mha_varlen_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(mha_fwd_kvcache, mha_fwd_kvcache);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(combine, combine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_cpu_isa, set_cpu_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isas, cpu_isas);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isa, cpu_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_threads, cpu_threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kernels, kernels);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_emulator, use_emulator);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(emulator_counters, emulator_counters);
