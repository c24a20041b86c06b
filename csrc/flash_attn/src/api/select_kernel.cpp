#include "api/select_kernel.h"

#include <algorithm>
#include <sstream>
#include <vector>

#include "base/call/target.h"
#include "common/operand_views.h"
#include "cpu/cpu_backend.h"
#if defined(FLASH_ATTN_HAVE_CUDA)
#include "hopper/hopper_backend.h"
#include "sm80/bwd_table.h"
#include "sm80/decode_table.h"
#include "sm80/sm80_backend.h"
#endif

namespace flash {
namespace {

constexpr Operation kOperations[] = {Operation::kMhaFwd,        Operation::kMhaVarlenFwd,
                                     Operation::kMhaBwd,        Operation::kMhaVarlenBwd,
                                     Operation::kMhaFwdKvcache, Operation::kCombine};
constexpr Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32,
                             Dtype::kFloat8E4M3};

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

// What attention asks for, alone and with an append.
struct Asked {
  const Attention_params& attention;
  const AppendParams& append;
  int64_t num_splits;
};

bool has_descale(const Attention_params& p) {
  return p.q_descale.ptr != nullptr || p.k_descale.ptr != nullptr || p.v_descale.ptr != nullptr;
}

bool has_block_descale(const Attention_params& p) {
  return p.q_descale.block_stride != 0 || p.k_descale.block_stride != 0 ||
         p.v_descale.block_stride != 0;
}

constexpr struct {
  Feature feature;
  const char* words;
  bool (*is_asked)(const Asked&);
} kFeatures[] = {
    {kDropout, "dropout", [](const Asked& a) { return a.attention.p_dropout > 0.f; }},
    {kSoftcap, "softcap", [](const Asked& a) { return a.attention.softcap > 0.f; }},
    {kAlibi, "ALiBi slopes", [](const Asked& a) { return a.attention.alibi_slopes != nullptr; }},
    {kSink, "attention sinks (s_aux)", [](const Asked& a) { return a.attention.s_aux != nullptr; }},
    {kBias, "attention bias", [](const Asked& a) { return a.attention.bias.ptr != nullptr; }},
    {kUsedKeys, "numbers of used keys (seqused_k, cache_seqlens)",
     [](const Asked& a) { return a.attention.seqused_k != nullptr; }},
    {kLeftPadding, "left padding (leftpad_k)",
     [](const Asked& a) { return a.attention.leftpad_k != nullptr; }},
    {kCacheIndices, "cache_batch_idx",
     [](const Asked& a) { return a.attention.cache_batch_idx != nullptr; }},
    {kPagedKeys, "paged keys (block_table)",
     [](const Asked& a) { return a.attention.block_table != nullptr; }},
    {kAppend, "appending to the cache",
     [](const Asked& a) { return a.append.knew.ptr != nullptr; }},
    {kRotary, "rotary embedding", [](const Asked& a) { return a.append.rotary_dim > 0; }},
    {kSplits, "num_splits", [](const Asked& a) { return a.num_splits > 1; }},
    {kDescale, "factors of fp8 tensors (q_descale, k_descale, v_descale)",
     [](const Asked& a) { return has_descale(a.attention); }},
    {kBlockDescale, "factors of fp8 tensors for each 128 rows",
     [](const Asked& a) { return has_block_descale(a.attention); }},
    {kFp8Keys, "keys and values in fp8 beside wider queries",
     [](const Asked& a) {
       return a.attention.kv_dtype == Dtype::kFloat8E4M3 && a.attention.dtype != Dtype::kFloat8E4M3;
     }},
    {kWideOutput, "an output of fp8 queries that is not bf16",
     [](const Asked& a) {
       return a.attention.dtype == Dtype::kFloat8E4M3 && a.attention.o_dtype != Dtype::kBFloat16;
     }},
};

uint32_t features_of(const Asked& asked) {
  uint32_t features = 0;
  for (const auto& row : kFeatures)
    if (row.is_asked(asked)) features |= row.feature;
  return features;
}

constexpr uint32_t bit(Dtype dtype) { return 1u << static_cast<int>(dtype); }

constexpr uint32_t kWideDtypes =
    bit(Dtype::kFloat16) | bit(Dtype::kBFloat16) | bit(Dtype::kFloat32);

bool is_forward(Operation operation) {
  return operation == Operation::kMhaFwd || operation == Operation::kMhaVarlenFwd ||
         operation == Operation::kMhaFwdKvcache;
}

// CPU kernels take every dtype (fp8 in forward calls), head dim and feature; one set for each
// instruction set that this CPU runs.
void add_cpu_kernels(std::vector<Kernel>& kernels) {
  for (const cpu::Isa isa : cpu::available_isas()) {
    const cpu::Kernels& set = cpu::kernels_of(isa);
    for (Operation operation : kOperations) {
      kernels.push_back(
          {.operation = operation,
           .device_type = FLASH_ATTN_CPU,
           .backend = "cpu",
           .isa = set.isa,
           .dtypes = kWideDtypes | (is_forward(operation) ? bit(Dtype::kFloat8E4M3) : 0),
           .max_d = FLASH_ATTN_MAX_HEAD_DIM,
           .max_d_v = FLASH_ATTN_MAX_HEAD_DIM,
           .features = kAllFeatures,
           .mha_fwd = set.mha_fwd,
           .mha_bwd = set.mha_bwd,
           .combine = set.combine});
    }
  }
}

#if defined(FLASH_ATTN_HAVE_CUDA)
// What Hopper's kernels are asked for; the rest is sm80's, and so are appending to a cache and the
// debugging output S_dmask.
bool hopper_takes(const Flash_fwd_params& p) {
  if (sm80::takes_decode(p)) return hopper::takes_decode(p);
  return p.d <= hopper::kMaxHeadDim && p.d_v <= hopper::kMaxHeadDim && hopper::takes(p);
}

void hopper_mha_fwd(const Flash_fwd_params& p) {
  if (!hopper_takes(p)) return sm80::mha_fwd(p);
  if (p.knew.ptr != nullptr) sm80::append_kv(p);
  if (sm80::takes_decode(p)) {
    hopper::mha_decode(p);
  } else {
    hopper::mha_fwd(p);
  }
  if (p.s_dmask != nullptr) sm80::store_dmask(p);
}

// Nothing else on a GPU knows fp8.
void require_fp8_takes(const Flash_fwd_params& p) {
  if (hopper::takes(p)) return;
  throw ApiError(FLASH_ATTN_UNSUPPORTED,
                 "the CUDA backend lacks fp8 keys in pages of which no 8 rows are within 128, or "
                 "with left padding (attention_chunk is, over a cache) in pages or beside factors "
                 "for each 128 rows; CPU tensors have them");
}

// The rows that are appended, and the caches, as pairs of bytes: nothing is rotated, so that
// appending only copies them.
Flash_fwd_params pairs_of_bytes(Flash_fwd_params p) {
  int64_t odd = (p.d | p.d_v) % 2;
  for (Operand* x : {&p.k, &p.v, &p.knew, &p.vnew}) {
    odd |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(x->ptr) % 2);
    for (int64_t* stride : {&x->batch_stride, &x->row_stride, &x->head_stride}) {
      odd |= *stride % 2;
      *stride /= 2;
    }
  }
  if (odd != 0)
    throw ApiError(FLASH_ATTN_UNSUPPORTED,
                   "the CUDA backend lacks appending of fp8 rows that are no whole pairs of bytes; "
                   "CPU tensors have it");
  p.d /= 2;
  p.d_v /= 2;
  p.dtype = Dtype::kFloat16;
  return p;
}

void hopper_mha_fwd_fp8(const Flash_fwd_params& p) {
  require_fp8_takes(p);
  if (p.knew.ptr != nullptr) sm80::append_kv(pairs_of_bytes(p));
  hopper::mha_fwd(p);
}

size_t hopper_mha_fwd_workspace_bytes(const Flash_fwd_params& p) {
  if (!hopper_takes(p)) return sm80::mha_fwd_workspace_bytes(p);
  return sm80::takes_decode(p) ? hopper::mha_decode_workspace_bytes(p)
                               : hopper::mha_fwd_workspace_bytes(p);
}

void hopper_mha_bwd(const Flash_bwd_params& p) {
  if (!hopper::takes(p)) return sm80::mha_bwd(p);
  hopper::mha_bwd(p);
  if (p.ds_aux != nullptr) sm80::store_sink_gradient(p);
}

size_t hopper_mha_bwd_workspace_bytes(const Flash_bwd_params& p) {
  return hopper::takes(p) ? hopper::mha_bwd_workspace_bytes(p) : sm80::mha_bwd_workspace_bytes(p);
}
#endif

void add_cuda_kernels([[maybe_unused]] std::vector<Kernel>& kernels) {
#if defined(FLASH_ATTN_HAVE_CUDA)
  for (const Operation operation :
       {Operation::kMhaFwd, Operation::kMhaVarlenFwd, Operation::kMhaFwdKvcache}) {
    kernels.push_back({.operation = operation,
                       .device_type = FLASH_ATTN_CUDA,
                       .backend = "cuda",
                       .isa = "sm90",
                       .min_capability = hopper::kComputeCapability,
                       .max_capability = hopper::kComputeCapability,
                       .dtypes = bit(Dtype::kFloat16) | bit(Dtype::kBFloat16),
                       .max_d = sm80::kMaxHeadDim,
                       .max_d_v = sm80::kMaxHeadDimV,
                       .features = kAllFeatures & ~kFp8Features,
                       .needs_tensor_maps = true,
                       .mha_fwd = hopper_mha_fwd,
                       .fwd_workspace_bytes = hopper_mha_fwd_workspace_bytes});
  }
  for (const Operation operation :
       {Operation::kMhaFwd, Operation::kMhaVarlenFwd, Operation::kMhaFwdKvcache}) {
    kernels.push_back({.operation = operation,
                       .device_type = FLASH_ATTN_CUDA,
                       .backend = "cuda",
                       .isa = "sm80",
                       .min_capability = sm80::kMinComputeCapability,
                       .dtypes = bit(Dtype::kFloat16) | bit(Dtype::kBFloat16),
                       .max_d = sm80::kMaxHeadDim,
                       .max_d_v = sm80::kMaxHeadDimV,
                       .features = kAllFeatures & ~kFp8Features,
                       .mha_fwd = sm80::mha_fwd,
                       .fwd_workspace_bytes = sm80::mha_fwd_workspace_bytes});
  }
  for (const Operation operation :
       {Operation::kMhaFwd, Operation::kMhaVarlenFwd, Operation::kMhaFwdKvcache}) {
    kernels.push_back({.operation = operation,
                       .device_type = FLASH_ATTN_CUDA,
                       .backend = "cuda",
                       .isa = "sm90",
                       .min_capability = hopper::kComputeCapability,
                       .max_capability = hopper::kComputeCapability,
                       .dtypes = bit(Dtype::kFloat8E4M3),
                       .max_d = hopper::kMaxHeadDim,
                       .max_d_v = hopper::kMaxHeadDim,
                       .features = kSoftcap | kAlibi | kSink | kUsedKeys | kLeftPadding |
                                   kCacheIndices | kPagedKeys | kAppend | kSplits | kDescale |
                                   kBlockDescale,
                       .needs_tensor_maps = true,
                       .mha_fwd = hopper_mha_fwd_fp8,
                       .fwd_workspace_bytes = hopper::mha_fwd_workspace_bytes});
  }
  for (const Operation operation : {Operation::kMhaBwd, Operation::kMhaVarlenBwd}) {
    kernels.push_back({.operation = operation,
                       .device_type = FLASH_ATTN_CUDA,
                       .backend = "cuda",
                       .isa = "sm90",
                       .min_capability = hopper::kComputeCapability,
                       .max_capability = hopper::kComputeCapability,
                       .dtypes = bit(Dtype::kFloat16) | bit(Dtype::kBFloat16),
                       .max_d = sm80::kMaxBwdHeadDim,
                       .max_d_v = sm80::kMaxBwdHeadDim,
                       .features = kAllFeatures,
                       .needs_tensor_maps = true,
                       .mha_bwd = hopper_mha_bwd,
                       .bwd_workspace_bytes = hopper_mha_bwd_workspace_bytes});
  }
  for (const Operation operation : {Operation::kMhaBwd, Operation::kMhaVarlenBwd}) {
    kernels.push_back({.operation = operation,
                       .device_type = FLASH_ATTN_CUDA,
                       .backend = "cuda",
                       .isa = "sm80",
                       .min_capability = sm80::kMinComputeCapability,
                       .dtypes = bit(Dtype::kFloat16) | bit(Dtype::kBFloat16),
                       .max_d = sm80::kMaxBwdHeadDim,
                       .max_d_v = sm80::kMaxBwdHeadDim,
                       .features = kAllFeatures & ~kFp8Features,
                       .mha_bwd = sm80::mha_bwd,
                       .bwd_workspace_bytes = sm80::mha_bwd_workspace_bytes});
  }
  kernels.push_back({.operation = Operation::kCombine,
                     .device_type = FLASH_ATTN_CUDA,
                     .backend = "cuda",
                     .isa = "sm80",
                     .min_capability = sm80::kMinComputeCapability,
                     .dtypes = bit(Dtype::kFloat16) | bit(Dtype::kBFloat16) | bit(Dtype::kFloat32),
                     .max_d = FLASH_ATTN_MAX_HEAD_DIM,
                     .max_d_v = FLASH_ATTN_MAX_HEAD_DIM,
                     .features = kAllFeatures & ~kFp8Features,
                     .combine = sm80::combine});
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

bool runs_on(const Kernel& kernel, int capability) {
  return kernel.min_capability <= capability && capability <= kernel.max_capability;
}

// Of the CPU's kernels those of the instruction set in use.
bool is_in_use(const Kernel& kernel) {
  return kernel.device_type != FLASH_ATTN_CPU ||
         kernel.isa == cpu::kernels_of(cpu::current_isa()).isa;
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

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

std::string capability_text(int capability) { return text(capability / 10, ".", capability % 10); }

// The devices of a kernel, where the request's is none of them.
std::string capabilities_of(const Kernel& kernel) {
  const std::string first = capability_text(kernel.min_capability);
  if (kernel.max_capability == kernel.min_capability) return text("compute capability ", first);
  if (kernel.max_capability == std::numeric_limits<int>::max())
    return text("compute capability ", first, " or newer");
  return text("compute capability ", first, " to ", capability_text(kernel.max_capability));
}

// Everything about `request` that `kernel` lacks, in words. A null kernel has no feature.
std::vector<std::string> missing(const Kernel* kernel, const KernelRequest& request) {
  std::vector<std::string> words;
  const uint32_t features = kernel == nullptr ? 0 : kernel->features;
  if (kernel == nullptr) words.emplace_back(words_for(request.operation));
  for (const auto& row : kFeatures)
    if ((request.features & ~features & row.feature) != 0) words.emplace_back(row.words);
  if (kernel == nullptr) return words;
  if ((kernel->dtypes & bit(request.dtype)) == 0) words.emplace_back(dtype_name(request.dtype));
  if (kernel->needs_tensor_maps && !request.has_tensor_maps)
    words.emplace_back("tensors with addresses or strides that are no multiples of 16 bytes");
  const auto check_dim = [&](const char* name, int64_t dim, int64_t limit) {
    if (dim > limit) words.push_back(text(name, " ", dim, " (at most ", limit, ")"));
  };
  check_dim("head dimension", request.d, kernel->max_d);
  if (request.d_v != request.d || kernel->max_d_v != kernel->max_d)
    check_dim("head dimension of v", request.d_v, kernel->max_d_v);
  return words;
}

// The kernel of the request's operation that lacks least, of equals the last: special ones come
// before those that serve the rest. Null if the backend has none.
const Kernel* best_candidate(const KernelRequest& request) {
  const Kernel* best = nullptr;
  size_t least = 0;
  for (const Kernel& kernel : all_kernels()) {
    if (kernel.device_type != request.target.device_type || kernel.operation != request.operation ||
        !runs_on(kernel, request.target.compute_capability))
      continue;
    const size_t count = missing(&kernel, request).size();
    if (best == nullptr || count <= least) {
      best = &kernel;
      least = count;
    }
  }
  return best;
}

std::string join(const std::vector<std::string>& words) {
  std::ostringstream list;
  for (const std::string& word : words) list << (&word == words.data() ? "" : ", ") << word;
  return list.str();
}

// Kernels for the request's device are there, but none for its compute capability: "" if not so.
std::string wrong_capability(const KernelRequest& request) {
  std::string devices;
  for (const Kernel& kernel : all_kernels()) {
    if (kernel.device_type != request.target.device_type) continue;
    if (runs_on(kernel, request.target.compute_capability)) return "";
    devices = capabilities_of(kernel);
  }
  return devices;
}

[[noreturn]] void fail_unsupported(const KernelRequest& request) {
  const bool is_cuda = request.target.device_type == FLASH_ATTN_CUDA;
  const auto& kernels = all_kernels();
  const bool backend_exists = std::any_of(
      kernels.begin(), kernels.end(),
      [&](const Kernel& kernel) { return kernel.device_type == request.target.device_type; });
  std::ostringstream sentence;
  if (!backend_exists) {
    sentence << kNoCudaKernels << ": " << name(request.operation) << " takes CPU tensors only";
  } else if (const std::string devices = wrong_capability(request); !devices.empty()) {
    sentence << "CUDA kernels need " << devices << ": device " << request.target.device_id
             << " has " << capability_text(request.target.compute_capability);
  } else {
    sentence << "the " << (is_cuda ? "CUDA" : "CPU") << " backend lacks "
             << join(missing(best_candidate(request), request)) << " (in "
             << name(request.operation) << ")";
    if (is_cuda)
      sentence << (request.target.is_emulated ? "; outside the emulator CPU tensors have it"
                                              : "; CPU tensors have it");
  }
  throw ApiError(FLASH_ATTN_UNSUPPORTED, sentence.str());
}

bool has_tensor_maps(const Attention_params& p) {
  constexpr int kFirst = 90;
  const OperandViews views = operand_views(p);
  // Calls without keys or queries: in 16 bits kernels without tensor maps serve them.
  const bool can = p.dtype == Dtype::kFloat8E4M3 ? can_map_if_any(views) : can_map(views);
  return can && p.target.compute_capability >= kFirst;
}

}  // namespace

KernelRequest request_of(Operation operation, const Flash_fwd_params& p) {
  return {operation,         p.target, p.dtype, p.d, p.d_v, features_of({p, p, p.num_splits}),
          has_tensor_maps(p)};
}

KernelRequest request_of(Operation operation, const Flash_bwd_params& p) {
  return {operation, p.target, p.dtype, p.d, p.d_v, features_of({p, {}, 0}), has_tensor_maps(p)};
}

KernelRequest request_of(Operation operation, const Combine_params& p) {
  return {operation, p.target, p.out_dtype, p.d_v, p.d_v};
}

bool serves(const Kernel& kernel, const KernelRequest& request) {
  return kernel.operation == request.operation &&
         kernel.device_type == request.target.device_type &&
         runs_on(kernel, request.target.compute_capability) &&
         (kernel.dtypes & bit(request.dtype)) != 0 && request.d <= kernel.max_d &&
         request.d_v <= kernel.max_d_v && (request.features & ~kernel.features) == 0 &&
         (request.has_tensor_maps || !kernel.needs_tensor_maps);
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
      table << separator << dtype_name(dtype);
      separator = ",";
    }
    table << " 1-" << kernel.max_d;
    if (kernel.max_d_v != kernel.max_d) table << ",v:1-" << kernel.max_d_v;
    table << "\n";
  }
  return table.str();
}

}  // namespace flash
