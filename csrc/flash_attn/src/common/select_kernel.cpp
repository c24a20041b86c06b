#include "common/select_kernel.h"

#include <vector>

#include "common/api_check_tensor.h"
#include "cpu/cpu_backend.h"
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "sm80/sm80_backend.h"
#include "sm80/tile_table.h"
#endif

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

// CPU kernels take every dtype, head dim and feature; one set for each instruction set that this
// CPU runs.
void add_cpu_kernels(std::vector<Kernel>& kernels) {
  int count = 0;
  const cpu::Kernels* const* isas = cpu::available(&count);
  for (int i = 0; i < count; ++i) {
    for (Operation operation : kOperations) {
      kernels.push_back({operation, FLASH_ATTN_CPU, "cpu", isas[i]->isa,
                         bit(Dtype::kFloat16) | bit(Dtype::kBFloat16) | bit(Dtype::kFloat32),
                         FLASH_ATTN_MAX_HEAD_DIM, kAllFeatures, isas[i]->mha_fwd, isas[i]->mha_bwd,
                         isas[i]->combine});
    }
  }
}

void add_cuda_kernels([[maybe_unused]] std::vector<Kernel>& kernels) {
#if defined(FLASH_ATTN_HAVE_CUDA)
  kernels.push_back({Operation::kMhaFwd, FLASH_ATTN_CUDA, "cuda", "sm80",
                     bit(Dtype::kFloat16) | bit(Dtype::kBFloat16), sm80::kMaxHeadDim, 0,
                     sm80::mha_fwd, nullptr, nullptr});
#endif
}

std::vector<Kernel> make_kernels() {
  std::vector<Kernel> kernels;
  add_cpu_kernels(kernels);
  add_cuda_kernels(kernels);
  return kernels;
}

const std::vector<Kernel>& all_kernels() {
  static const std::vector<Kernel> kernels = make_kernels();
  return kernels;
}

bool serves(const Kernel& kernel, const KernelRequest& request) {
  return kernel.operation == request.operation && kernel.device_type == request.device_type &&
         (kernel.dtypes & bit(request.dtype)) != 0 && request.head_dim <= kernel.max_head_dim &&
         (request.features & ~kernel.features) == 0;
}

// Of the CPU's kernels those of the instruction set in use.
bool is_in_use(const Kernel& kernel) {
  return kernel.device_type != FLASH_ATTN_CPU || kernel.isa == cpu::current().isa;
}

const char* words_for(Operation operation) {
  switch (operation) {
    case Operation::kMhaFwd:
      return "the dense forward";
    case Operation::kMhaVarlenFwd:
      return "packed sequences (varlen)";
    case Operation::kMhaBwd:
      return "the backward pass";
    case Operation::kMhaVarlenBwd:
      return "packed sequences (varlen), the backward pass";
    case Operation::kMhaFwdKvcache:
      return "attention with a KV cache";
    case Operation::kCombine:
      return "combining partial results";
  }
  return "";
}

constexpr struct {
  Feature feature;
  const char* words;
} kFeatureWords[] = {{kDropout, "dropout"},     {kSoftcap, "softcap"},
                     {kAlibi, "ALiBi slopes"},  {kSink, "attention sinks (s_aux)"},
                     {kBias, "attention bias"}, {kPagedKeys, "paged keys (block_table)"}};

// Everything about `request` that `kernel` lacks, in words; "" if nothing.
std::string missing(const Kernel* kernel, const KernelRequest& request) {
  std::ostringstream list;
  const char* separator = "";
  const auto add = [&](const auto&... words) {
    list << separator;
    (list << ... << words);
    separator = ", ";
  };
  if (kernel == nullptr) add(words_for(request.operation));
  const uint32_t features = kernel == nullptr ? 0 : kernel->features;
  for (const auto& [feature, words] : kFeatureWords)
    if ((request.features & ~features & feature) != 0) add(words);
  if (kernel == nullptr) return list.str();
  if ((kernel->dtypes & bit(request.dtype)) == 0) add(name(request.dtype));
  if (request.head_dim > kernel->max_head_dim)
    add("head dimension ", request.head_dim, " (at most ", kernel->max_head_dim, ")");
  return list.str();
}

[[noreturn]] void fail_unsupported(const KernelRequest& request) {
  const Kernel* same_operation = nullptr;
  bool backend_exists = false;
  for (const Kernel& kernel : all_kernels()) {
    if (kernel.device_type != request.device_type) continue;
    backend_exists = true;
    if (kernel.operation == request.operation) same_operation = &kernel;
  }
  std::ostringstream sentence;
  if (!backend_exists) {
    sentence << kNoCudaKernels << ": " << name(request.operation) << " takes CPU tensors only";
  } else {
    sentence << "the " << (request.device_type == FLASH_ATTN_CUDA ? "CUDA" : "CPU")
             << " backend lacks " << missing(same_operation, request) << " (in "
             << name(request.operation) << ")";
    if (request.device_type == FLASH_ATTN_CUDA) sentence << "; CPU tensors have it";
  }
  throw ApiError(FLASH_ATTN_UNSUPPORTED, sentence.str());
}

}  // namespace

uint32_t features_of(const Flash_fwd_params& p) {
  uint32_t features = 0;
  if (p.p_dropout > 0.f) features |= kDropout;
  if (p.softcap > 0.f) features |= kSoftcap;
  if (p.alibi_slopes != nullptr) features |= kAlibi;
  if (p.s_aux != nullptr) features |= kSink;
  if (p.bias.ptr != nullptr) features |= kBias;
  if (p.block_table != nullptr) features |= kPagedKeys;
  return features;
}

const Kernel& select_kernel(const KernelRequest& request) {
  for (const Kernel& kernel : all_kernels()) {
    if (serves(kernel, request) && is_in_use(kernel)) return kernel;
  }
  fail_unsupported(request);
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
