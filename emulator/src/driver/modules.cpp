#include "modules.h"

#include <algorithm>
#include <cstring>

#include "fatbin/fatbin.h"
#include "host_memory.h"
#include "ptx/parser.h"

namespace gpu_emulator::driver {
namespace {

constexpr uint32_t kWrapperMagic = 0x466243b1;  // FATBINC_MAGIC of fatbinary_section.h
constexpr uint64_t kMaxImageBytes = uint64_t{1} << 30;
constexpr size_t kMaxParameterBytes = 32764;  // since sm_70, PTX ISA 8.1

struct Wrapper {
  uint32_t magic;
  uint32_t version;
  const void* data;
  const void* file_name;
};

template <typename T>
bool begins_with(const std::vector<std::byte>& bytes, T value) {
  return bytes.size() >= sizeof(T) && std::memcmp(bytes.data(), &value, sizeof(T)) == 0;
}

[[noreturn]] void fail_unreadable() {
  fail(CUDA_ERROR_INVALID_IMAGE,
       "The image cannot be read to its end: a wild pointer, or a truncated image.");
}

std::vector<std::byte> fetch_text(const void* image) {
  for (size_t bytes = 1 << 16;; bytes *= 4) {
    std::vector<std::byte> text = read_up_to(image, bytes);
    const auto end = std::find(text.begin(), text.end(), std::byte{0});
    if (end != text.end()) {
      text.erase(end, text.end());
      return text;
    }
    if (text.size() < bytes || bytes > kMaxImageBytes) fail_unreadable();
  }
}

std::string ptx_of(const std::vector<std::byte>& image, const Arch& arch) {
  if (!fatbin::announced_size(image)) {
    return std::string(reinterpret_cast<const char*>(image.data()), image.size());
  }
  try {
    return fatbin::best_ptx(image, arch.major, arch.minor);
  } catch (const fatbin::FatbinError& error) {
    const bool lacks_ptx = std::string_view(error.what()).find("has no PTX") != std::string::npos;
    fail(lacks_ptx ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_ERROR_INVALID_IMAGE,
         std::string("The image cannot be loaded: ") + error.what() + ".");
  }
}

ptx::Module parse(const std::string& text) {
  try {
    return ptx::parse(text);
  } catch (const ptx::ParseError& error) {
    fail(CUDA_ERROR_INVALID_PTX, std::string("The PTX does not parse: ") + error.what() + ".");
  }
}

void check_target(const std::string& target, const Arch& arch) {
  if (fatbin::runs_on(target, arch.major, arch.minor)) return;
  fail(CUDA_ERROR_NO_BINARY_FOR_GPU, "PTX for " + target.substr(0, 60) + " does not run on " +
                                         arch.name + " (sm_" +
                                         std::to_string(10 * arch.major + arch.minor) + ").");
}

void check_limits(const exec::Program& program, const Arch& arch) {
  for (const exec::Function& function : program.functions) {
    if (!function.is_entry || !function.has_body) continue;
    if (function.shared_bytes > static_cast<uint64_t>(arch.shared_per_block)) {
      fail(CUDA_ERROR_INVALID_PTX, "Kernel " + function.name + " has " +
                                       std::to_string(function.shared_bytes) +
                                       " bytes of static shared memory; the limit is " +
                                       std::to_string(arch.shared_per_block) + ".");
    }
    if (function.param_bytes > kMaxParameterBytes) {
      fail(CUDA_ERROR_INVALID_PTX, "Kernel " + function.name + " has " +
                                       std::to_string(function.param_bytes) +
                                       " bytes of parameters; the limit is 32764.");
    }
  }
}

}  // namespace

std::vector<std::byte> fetch_image(const void* image) {
  require_pointer(image, "image");
  std::vector<std::byte> first = read_up_to(image, sizeof(Wrapper));
  if (first.empty()) fail_unreadable();
  if (begins_with(first, kWrapperMagic)) {
    Wrapper wrapper;
    if (first.size() < sizeof(wrapper)) fail_unreadable();
    std::memcpy(&wrapper, first.data(), sizeof(wrapper));
    image = wrapper.data;
    first = read_up_to(image, fatbin::kHeaderBytes);
    if (!fatbin::announced_size(first)) fail_unreadable();
  }
  if (const auto size = fatbin::announced_size(first)) {
    if (*size > kMaxImageBytes) fail_unreadable();
    std::vector<std::byte> bytes = read_up_to(image, *size);
    if (bytes.size() < *size) fail_unreadable();
    return bytes;
  }
  constexpr char kElfMagic[4] = {0x7f, 'E', 'L', 'F'};
  if (first.size() >= 4 && std::memcmp(first.data(), kElfMagic, 4) == 0) {
    fail(CUDA_ERROR_NO_BINARY_FOR_GPU,
         "The image is machine code (a cubin). The emulator runs PTX: compile with -ptx or "
         "-gencode arch=compute_NN,code=compute_NN.");
  }
  return fetch_text(image);
}

std::shared_ptr<Module> load_module(Driver& state, const std::vector<std::byte>& image) {
  const int device = state.require_context().device;
  const Arch& arch = *state.devices[device].arch;
  const ptx::Module parsed = parse(ptx_of(image, arch));
  check_target(parsed.target, arch);
  auto module = std::make_shared<Module>();
  module->device = device;
  module->context = state.current_context();
  module->program = exec::decode(parsed);
  check_limits(*module->program, arch);
  if (const uint64_t bytes = module->program->module_bytes) {
    Allocation& memory = state.allocations.create(
        Allocation::Kind::kModule, device, reinterpret_cast<uint64_t>(module->context), bytes,
        "module variables of " + std::to_string(bytes) + " bytes");
    module->base = memory.begin;
    const std::vector<std::byte> initial = module->program->image(module->base);
    std::memcpy(reinterpret_cast<void*>(module->base), initial.data(), initial.size());
  }
  return module;
}

int find_kernel(const Module& module, const std::string& name) {
  const int index = module.program->find_function(name);
  const auto& functions = module.program->functions;
  if (index >= 0 && functions[index].is_entry && functions[index].has_body) return index;
  std::string known;
  for (const exec::Function& function : functions) {
    if (!function.is_entry || known.size() > 1000) continue;
    known += (known.empty() ? " It has: " : ", ") + function.name;
  }
  fail(CUDA_ERROR_NOT_FOUND, "The module has no kernel '" + name.substr(0, 200) + "'." + known);
}

CUfunction function_of_kernel(Driver& state, CUkernel handle) {
  const auto kernel = require_object(state.kernels, handle);
  const auto library = require_object(state.libraries, kernel->library);
  state.require_context();
  const auto context = reinterpret_cast<uint64_t>(state.current_context());
  if (const auto it = kernel->functions.find(context); it != kernel->functions.end()) {
    return it->second;
  }
  std::shared_ptr<Module>& module = library->modules[context];
  if (!module) module = load_module(state, library->image);
  auto function = std::make_shared<Function>();
  function->module = module;
  function->index = find_kernel(*module, kernel->name);
  return kernel->functions[context] = state.functions.add(std::move(function));
}

}  // namespace gpu_emulator::driver
