// The C interface: check, choose a kernel, run it. No exception passes.
#include "flash_attn/flash_attn.h"

#include <string>

#include "api/check.h"
#include "api/run.h"
#include "base/call/guarded.h"
#include "base/cpu/isa.h"
#include "base/cpu/scratch.h"

namespace flash {
namespace {

// The tensor whose device is the call's.
const flash_attn_tensor& leader(const flash_attn_combine_args& args) { return *args.out; }
template <typename Args>
const flash_attn_tensor& leader(const Args& args) {
  return *args.q;
}

// The checked arguments of a call with their target, and the kernel that serves them.
template <typename Params>
struct Chosen {
  Params params;
  const Kernel& kernel;
};

template <typename Args, typename Params>
Chosen<Params> choose(Operation operation, const Args* args, Params (*check)(const Args&)) {
  require_pointer(args, "args");
  Params p = check(*args);
  p.target = target_of(leader(*args), args->stream);
  const Kernel& kernel = select_kernel(request_of(operation, p));
  return {p, kernel};
}

// One call: check, choose, run.
template <typename Args, typename Params>
flash_attn_status call(Operation operation, const Args* args, Params (*check)(const Args&)) {
  return guarded([&] {
    auto [p, kernel] = choose(operation, args, check);
    run(kernel, *args, p);
  });
}

template <typename Args, typename Params>
flash_attn_status workspace_size(Operation operation, const Args* args, size_t* bytes,
                                 Params (*check)(const Args&)) {
  return guarded([&] {
    require_pointer(bytes, "bytes");
    const auto [p, kernel] = choose(operation, args, check);
    *bytes = workspace_bytes(kernel, p);
  });
}

std::string join_isas() {
  std::string names;
  for (const cpu::Isa isa : cpu::available_isas()) {
    names += names.empty() ? "" : " ";
    names += cpu::isa_name(isa);
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
using flash::Operation;

extern "C" {

flash_attn_status flash_attn_mha_fwd(const flash_attn_fwd_args* args) {
  return flash::call(Operation::kMhaFwd, args, flash::check_mha_fwd);
}

flash_attn_status flash_attn_mha_varlen_fwd(const flash_attn_fwd_args* args) {
  return flash::call(Operation::kMhaVarlenFwd, args, flash::check_mha_varlen_fwd);
}

flash_attn_status flash_attn_mha_bwd(const flash_attn_bwd_args* args) {
  return flash::call(Operation::kMhaBwd, args, flash::check_mha_bwd);
}

flash_attn_status flash_attn_mha_varlen_bwd(const flash_attn_bwd_args* args) {
  return flash::call(Operation::kMhaVarlenBwd, args, flash::check_mha_varlen_bwd);
}

flash_attn_status flash_attn_mha_fwd_kvcache(const flash_attn_kvcache_args* args) {
  return flash::call(Operation::kMhaFwdKvcache, args, flash::check_mha_fwd_kvcache);
}

flash_attn_status flash_attn_combine(const flash_attn_combine_args* args) {
  return flash::call(Operation::kCombine, args, flash::check_combine);
}

flash_attn_status flash_attn_mha_fwd_workspace_size(const flash_attn_fwd_args* args,
                                                    size_t* bytes) {
  return flash::workspace_size(Operation::kMhaFwd, args, bytes, flash::check_mha_fwd);
}

flash_attn_status flash_attn_mha_varlen_fwd_workspace_size(const flash_attn_fwd_args* args,
                                                           size_t* bytes) {
  return flash::workspace_size(Operation::kMhaVarlenFwd, args, bytes, flash::check_mha_varlen_fwd);
}

flash_attn_status flash_attn_mha_bwd_workspace_size(const flash_attn_bwd_args* args,
                                                    size_t* bytes) {
  return flash::workspace_size(Operation::kMhaBwd, args, bytes, flash::check_mha_bwd);
}

flash_attn_status flash_attn_mha_varlen_bwd_workspace_size(const flash_attn_bwd_args* args,
                                                           size_t* bytes) {
  return flash::workspace_size(Operation::kMhaVarlenBwd, args, bytes, flash::check_mha_varlen_bwd);
}

flash_attn_status flash_attn_mha_fwd_kvcache_workspace_size(const flash_attn_kvcache_args* args,
                                                            size_t* bytes) {
  return flash::workspace_size(Operation::kMhaFwdKvcache, args, bytes,
                               flash::check_mha_fwd_kvcache);
}

const char* flash_attn_last_error(void) { return flash::last_error(); }

const char* flash_attn_version(void) { return FLASH_ATTN_VERSION; }

const char* flash_attn_cpu_isas(void) { return flash::isa_names().c_str(); }

const char* flash_attn_cpu_isa(void) {
  const char* name = nullptr;
  guarded([&] { name = flash::cpu::isa_name(flash::cpu::current_isa()); });
  return name;
}

flash_attn_status flash_attn_set_cpu_isa(const char* name) {
  return guarded([=] {
    flash::require(flash::cpu::set_current_isa(name), "CPU instruction set \"",
                   name == nullptr ? "" : name,
                   "\" is not available; this machine has: ", flash::isa_names());
  });
}

flash_attn_status flash_attn_use_emulator(const char* description, const char* library) {
  return guarded([=] { flash::use_emulator(description, library); });
}

const char* flash_attn_emulator_counters(void) {
  thread_local std::string counters;
  const auto read = [&] { counters = flash::emulator_counters(); };
  return guarded(read) == FLASH_ATTN_OK ? counters.c_str() : nullptr;
}

int flash_attn_cpu_threads(void) { return flash::cpu::num_threads(); }

const char* flash_attn_kernels(void) {
  static const std::string table = flash::support_table();
  return table.c_str();
}

}  // extern "C"
