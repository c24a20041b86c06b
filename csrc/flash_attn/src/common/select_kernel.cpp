#include "common/select_kernel.h"

#include <vector>

#include "common/api_check_tensor.h"

namespace flash {
namespace {

constexpr Operation kOperations[] = {Operation::kMhaFwd,        Operation::kMhaVarlenFwd,
                                     Operation::kMhaBwd,        Operation::kMhaVarlenBwd,
                                     Operation::kMhaFwdKvcache, Operation::kCombine};
constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32};

const char* name(Operation operation) {
  switch (operation) {
    case Operation::kMhaFwd:
      return "mha_fwd";
    case Operation::kMhaVarlenFwd:
      return "mha_varlen_fwd";
    case Operation::kMhaBwd:
      return "mha_bwd";
    case Operation::kMhaVarlenBwd:
      return "mha_varlen_bwd";
    case Operation::kMhaFwdKvcache:
      return "mha_fwd_kvcache";
    case Operation::kCombine:
      return "combine";
  }
  return "";
}

const char* name(Dtype dtype) {
  return dtype == Dtype::kFloat16 ? "fp16" : dtype == Dtype::kBFloat16 ? "bf16" : "fp32";
}

uint32_t bit(Dtype dtype) { return 1u << static_cast<int>(dtype); }

// CPU kernels take every dtype and head dim; one set for each instruction set that this CPU runs.
std::vector<Kernel> make_kernels() {
  std::vector<Kernel> kernels;
  int count = 0;
  const cpu::Kernels* const* isas = cpu::available(&count);
  for (int i = 0; i < count; ++i) {
    for (Operation operation : kOperations) {
      kernels.push_back({operation, FLASH_ATTN_CPU, "cpu", isas[i]->isa,
                         bit(Dtype::kFloat16) | bit(Dtype::kBFloat16) | bit(Dtype::kFloat32),
                         FLASH_ATTN_MAX_HEAD_DIM, isas[i]});
    }
  }
  return kernels;
}

const std::vector<Kernel>& all_kernels() {
  static const std::vector<Kernel> kernels = make_kernels();
  return kernels;
}

bool serves(const Kernel& kernel, const KernelRequest& request) {
  return kernel.operation == request.operation && kernel.device_type == request.device_type &&
         (kernel.dtypes & bit(request.dtype)) != 0 && request.head_dim <= kernel.max_head_dim;
}

}  // namespace

const Kernel& select_kernel(const KernelRequest& request) {
  const cpu::Kernels& current_isa = cpu::current();
  bool backend_exists = false;
  for (const Kernel& kernel : all_kernels()) {
    backend_exists |= kernel.device_type == request.device_type;
    if (serves(kernel, request) && kernel.cpu == &current_isa) return kernel;
  }
  std::ostringstream sentence;
  if (backend_exists) {
    sentence << "no kernel of this build does " << name(request.operation) << " in "
             << name(request.dtype) << " with head dimension " << request.head_dim;
  } else {
    sentence << "this build of flash_attn has no CUDA kernels: " << name(request.operation)
             << " takes CPU tensors only";
  }
  throw ApiError(FLASH_ATTN_UNSUPPORTED, sentence.str());
}

std::string support_table() {
  std::ostringstream table;
  for (const Kernel& kernel : all_kernels()) {
    table << kernel.backend << " " << kernel.isa << " " << name(kernel.operation) << " ";
    const char* separator = "";
    for (Dtype dtype : kDtypes) {
      if ((kernel.dtypes & bit(dtype)) == 0) continue;
      table << separator << name(dtype);
      separator = ",";
    }
    table << " 1-" << kernel.max_head_dim << "\n";
  }
  return table.str();
}

}  // namespace flash
