// The C interface: check, choose a kernel, run it. No exception passes.
#include "flash_attn/flash_attn.h"

#include <algorithm>
#include <cstdio>
#include <new>
#include <string>

#include "common/api_check.h"
#include "common/select_kernel.h"
#include "cpu/cpu_backend.h"

namespace flash {
namespace {

thread_local char last_error[1024] = "";

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

const cpu::Kernels& select(Operation operation, const flash_attn_tensor& q,
                           const Flash_fwd_params& p) {
  return *select_kernel({operation, q.device_type, p.dtype, std::max(p.d, p.d_v)}).cpu;
}

// Chooses a kernel and runs it, or with `workspace_bytes` only tells what it needs: CPU kernels
// allocate inside.
void forward(Operation operation, const flash_attn_tensor& q, const Flash_fwd_params& p,
             size_t* workspace_bytes) {
  const cpu::Kernels& kernels = select(operation, q, p);
  if (workspace_bytes != nullptr) {
    *workspace_bytes = 0;
    return;
  }
  kernels.mha_fwd(p);
}

void backward(Operation operation, const flash_attn_tensor& q, const Flash_bwd_params& p,
              size_t* workspace_bytes) {
  const cpu::Kernels& kernels = select(operation, q, p);
  if (workspace_bytes != nullptr) {
    *workspace_bytes = 0;
    return;
  }
  kernels.mha_bwd(p);
}

// The six operations; `bytes` as in forward and backward.
void mha_fwd(const flash_attn_fwd_args* args, size_t* bytes) {
  require_pointer(args, "args");
  const Flash_fwd_params p = check_mha_fwd(*args);
  forward(Operation::kMhaFwd, *args->q, p, bytes);
}

void mha_varlen_fwd(const flash_attn_fwd_args* args, size_t* bytes) {
  require_pointer(args, "args");
  const Flash_fwd_params p = check_mha_varlen_fwd(*args);
  forward(Operation::kMhaVarlenFwd, *args->q, p, bytes);
}

void mha_bwd(const flash_attn_bwd_args* args, size_t* bytes) {
  require_pointer(args, "args");
  backward(Operation::kMhaBwd, *args->q, check_mha_bwd(*args), bytes);
}

void mha_varlen_bwd(const flash_attn_bwd_args* args, size_t* bytes) {
  require_pointer(args, "args");
  backward(Operation::kMhaVarlenBwd, *args->q, check_mha_varlen_bwd(*args), bytes);
}

void mha_fwd_kvcache(const flash_attn_kvcache_args* args, size_t* bytes) {
  require_pointer(args, "args");
  const Flash_fwd_params p = check_mha_fwd_kvcache(*args);
  forward(Operation::kMhaFwdKvcache, *args->q, p, bytes);
}

void combine(const flash_attn_combine_args* args) {
  require_pointer(args, "args");
  const Combine_params p = check_combine(*args);
  select_kernel({Operation::kCombine, args->out->device_type, p.out_dtype, p.d_v}).cpu->combine(p);
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

const char* flash_attn_cpu_isa(void) { return flash::cpu::current().isa; }

flash_attn_status flash_attn_set_cpu_isa(const char* name) {
  return guarded([=] {
    flash::require(flash::cpu::set_current(name), "CPU instruction set \"",
                   name == nullptr ? "" : name,
                   "\" is not available; this machine has: ", flash::isa_names());
  });
}

int flash_attn_cpu_threads(void) { return flash::cpu::num_threads(); }

const char* flash_attn_kernels(void) {
  static const std::string table = flash::support_table();
  return table.c_str();
}

}  // extern "C"
