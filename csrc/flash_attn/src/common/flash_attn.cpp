// The C interface: check, choose a kernel, run it. No exception passes.
#include "flash_attn/flash_attn.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <string>

#include "common/api_check.h"
#include "common/select_kernel.h"
#include "cpu/cpu_backend.h"
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "cuda_driver/emulated.h"
#endif

namespace flash {
namespace {

// Reports of the emulated GPU are long.
thread_local char last_error[8192] = "";

flash_attn_status keep_error(flash_attn_status status, const char* sentence) {
  std::snprintf(last_error, sizeof(last_error), "%s", sentence);
  return status;
}

template <typename Body>
flash_attn_status guarded(const Body& body) noexcept {
  try {
    body();
    return FLASH_ATTN_OK;
  } catch (const ApiError& error) {
    return keep_error(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return keep_error(FLASH_ATTN_OUT_OF_MEMORY, "flash_attn ran out of memory");
  } catch (const std::exception& error) {
    return keep_error(FLASH_ATTN_INTERNAL_ERROR, error.what());
  } catch (...) {
    return keep_error(FLASH_ATTN_INTERNAL_ERROR, "unknown error inside flash_attn");
  }
}

void require_pointer(const void* pointer, const char* name) {
  require(pointer != nullptr, name, " must not be NULL");
}

#if !defined(FLASH_ATTN_HAVE_CUDA)
void require_nothing_to_emulate(const char* description) {
  if (description != nullptr && *description != '\0')
    throw ApiError(FLASH_ATTN_UNSUPPORTED,
                   std::string(kNoCudaKernels) + ": there is nothing to emulate");
}
#endif

// The device whose kernels serve a tensor: CPU tensors may belong to the emulated GPU.
flash_attn_device_type serving_device(flash_attn_device_type type) {
#if defined(FLASH_ATTN_HAVE_CUDA)
  if (type == FLASH_ATTN_CPU && cuda::emulated_device() != nullptr) return FLASH_ATTN_CUDA;
#else
  static const char* const description = std::getenv("FLASH_ATTENTION_EMULATOR");
  require_nothing_to_emulate(description);
#endif
  return type;
}

const Kernel& select(Operation operation, const Flash_fwd_params& p) {
  return select_kernel(
      {operation, serving_device(p.device_type), p.dtype, std::max(p.d, p.d_v), features_of(p)});
}

// Chooses a kernel and runs it, or with `workspace_bytes` only tells what it needs: no kernel wants
// any so far.
void forward(Operation operation, const Flash_fwd_params& p, size_t* workspace_bytes) {
  const Kernel& kernel = select(operation, p);
  if (workspace_bytes != nullptr) {
    *workspace_bytes = 0;
    return;
  }
  kernel.mha_fwd(p);
}

void backward(Operation operation, const Flash_bwd_params& p, size_t* workspace_bytes) {
  const Kernel& kernel = select(operation, p);
  if (workspace_bytes != nullptr) {
    *workspace_bytes = 0;
    return;
  }
  kernel.mha_bwd(p);
}

// The six operations; `bytes` as in forward and backward.
void mha_fwd(const flash_attn_fwd_args* args, size_t* bytes) {
  require_pointer(args, "args");
  const Flash_fwd_params p = check_mha_fwd(*args);
  forward(Operation::kMhaFwd, p, bytes);
}

void mha_varlen_fwd(const flash_attn_fwd_args* args, size_t* bytes) {
  require_pointer(args, "args");
  const Flash_fwd_params p = check_mha_varlen_fwd(*args);
  forward(Operation::kMhaVarlenFwd, p, bytes);
}

void mha_bwd(const flash_attn_bwd_args* args, size_t* bytes) {
  require_pointer(args, "args");
  backward(Operation::kMhaBwd, check_mha_bwd(*args), bytes);
}

void mha_varlen_bwd(const flash_attn_bwd_args* args, size_t* bytes) {
  require_pointer(args, "args");
  backward(Operation::kMhaVarlenBwd, check_mha_varlen_bwd(*args), bytes);
}

void mha_fwd_kvcache(const flash_attn_kvcache_args* args, size_t* bytes) {
  require_pointer(args, "args");
  const Flash_fwd_params p = check_mha_fwd_kvcache(*args);
  forward(Operation::kMhaFwdKvcache, p, bytes);
}

void combine(const flash_attn_combine_args* args) {
  require_pointer(args, "args");
  const Combine_params p = check_combine(*args);
  const flash_attn_device_type device = serving_device(args->out->device_type);
  select_kernel({Operation::kCombine, device, p.out_dtype, p.d_v}).combine(p);
}

std::string join_isas() {
  int count = 0;
  const cpu::Kernels* const* isas = cpu::available(&count);
  std::string names;
  for (int i = 0; i < count; ++i) {
    names += i > 0 ? " " : "";
    names += isas[i]->isa;
  }
  return names;
}

// Sends this thread's CPU tensors to the emulated GPU, or with "" back to the CPU backend.
void use_emulator(const char* description, const char* library) {
#if defined(FLASH_ATTN_HAVE_CUDA)
  cuda::use_emulator(description != nullptr ? description : "", library != nullptr ? library : "");
#else
  static_cast<void>(library);
  require_nothing_to_emulate(description);
#endif
}

const char* emulator_counters() {
#if defined(FLASH_ATTN_HAVE_CUDA)
  thread_local std::string counters;
  counters = cuda::emulator_counters();
  return counters.c_str();
#else
  return "";
#endif
}

const std::string& isa_names() {
  static const std::string names = join_isas();
  return names;
}

}  // namespace
}  // namespace flash

using flash::guarded;

extern "C" {

flash_attn_status flash_attn_mha_fwd(const flash_attn_fwd_args* args) {
  return guarded([=] { flash::mha_fwd(args, nullptr); });
}

flash_attn_status flash_attn_mha_varlen_fwd(const flash_attn_fwd_args* args) {
  return guarded([=] { flash::mha_varlen_fwd(args, nullptr); });
}

flash_attn_status flash_attn_mha_bwd(const flash_attn_bwd_args* args) {
  return guarded([=] { flash::mha_bwd(args, nullptr); });
}

flash_attn_status flash_attn_mha_varlen_bwd(const flash_attn_bwd_args* args) {
  return guarded([=] { flash::mha_varlen_bwd(args, nullptr); });
}

flash_attn_status flash_attn_mha_fwd_kvcache(const flash_attn_kvcache_args* args) {
  return guarded([=] { flash::mha_fwd_kvcache(args, nullptr); });
}

flash_attn_status flash_attn_combine(const flash_attn_combine_args* args) {
  return guarded([=] { flash::combine(args); });
}

flash_attn_status flash_attn_mha_fwd_workspace_size(const flash_attn_fwd_args* args,
                                                    size_t* bytes) {
  return guarded([=] {
    flash::require_pointer(bytes, "bytes");
    flash::mha_fwd(args, bytes);
  });
}

flash_attn_status flash_attn_mha_varlen_fwd_workspace_size(const flash_attn_fwd_args* args,
                                                           size_t* bytes) {
  return guarded([=] {
    flash::require_pointer(bytes, "bytes");
    flash::mha_varlen_fwd(args, bytes);
  });
}

flash_attn_status flash_attn_mha_bwd_workspace_size(const flash_attn_bwd_args* args,
                                                    size_t* bytes) {
  return guarded([=] {
    flash::require_pointer(bytes, "bytes");
    flash::mha_bwd(args, bytes);
  });
}

flash_attn_status flash_attn_mha_varlen_bwd_workspace_size(const flash_attn_bwd_args* args,
                                                           size_t* bytes) {
  return guarded([=] {
    flash::require_pointer(bytes, "bytes");
    flash::mha_varlen_bwd(args, bytes);
  });
}

flash_attn_status flash_attn_mha_fwd_kvcache_workspace_size(const flash_attn_kvcache_args* args,
                                                            size_t* bytes) {
  return guarded([=] {
    flash::require_pointer(bytes, "bytes");
    flash::mha_fwd_kvcache(args, bytes);
  });
}

const char* flash_attn_last_error(void) { return flash::last_error; }

const char* flash_attn_version(void) { return FLASH_ATTN_VERSION; }

const char* flash_attn_cpu_isas(void) { return flash::isa_names().c_str(); }

const char* flash_attn_cpu_isa(void) {
  const char* name = nullptr;
  guarded([&] { name = flash::cpu::current().isa; });
  return name;
}

flash_attn_status flash_attn_set_cpu_isa(const char* name) {
  return guarded([=] {
    flash::require(flash::cpu::set_current(name), "CPU instruction set \"",
                   name == nullptr ? "" : name,
                   "\" is not available; this machine has: ", flash::isa_names());
  });
}

flash_attn_status flash_attn_use_emulator(const char* description, const char* library) {
  return guarded([=] { flash::use_emulator(description, library); });
}

const char* flash_attn_emulator_counters(void) {
  const char* counters = nullptr;
  guarded([&] { counters = flash::emulator_counters(); });
  return counters;
}

int flash_attn_cpu_threads(void) { return flash::cpu::num_threads(); }

const char* flash_attn_kernels(void) {
  static const std::string table = flash::support_table();
  return table.c_str();
}

}  // extern "C"
