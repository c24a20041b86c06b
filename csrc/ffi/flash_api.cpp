// The apache-tvm-ffi face of libflash_attn: tensors come in as DLPack views, a status other than OK
// goes out as a Python RuntimeError, or MemoryError, with the library's sentence. Arguments are
// checked behind the C interface, not here.
#include <dlpack/dlpack.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flash_attn/activations.h"
#include "flash_attn/flash_attn.h"
#include "flash_attn/layer_norm.h"
#include "flash_attn/rotary.h"
#include "flash_attn/xentropy.h"

namespace {

using tvm::ffi::Any;
using tvm::ffi::AnyView;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::PackedArgs;
using tvm::ffi::String;
using tvm::ffi::TensorView;

flash_attn_dtype to_dtype(DLDataType dtype) {
  if (dtype.lanes != 1) return FLASH_ATTN_OTHER_DTYPE;
  if (dtype.code == kDLFloat && dtype.bits == 16) return FLASH_ATTN_FLOAT16;
  if (dtype.code == kDLFloat && dtype.bits == 32) return FLASH_ATTN_FLOAT32;
  if (dtype.code == kDLBfloat && dtype.bits == 16) return FLASH_ATTN_BFLOAT16;
  if (dtype.code == kDLFloat8_e4m3fn && dtype.bits == 8) return FLASH_ATTN_FLOAT8_E4M3;
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

// Describes a view as the library knows it; what lies beyond its ndim stays as it was.
void describe(const TensorView& view, flash_attn_tensor& tensor) {
  tensor.data = static_cast<char*>(view.data_ptr()) + view.byte_offset();
  tensor.dtype = to_dtype(view.dtype());
  tensor.device_type = to_device_type(view.device().device_type);
  tensor.device_id = view.device().device_id;
  tensor.ndim = view.ndim();
  // The library rejects a tensor of more dimensions by its ndim alone.
  const int stored = std::min(tensor.ndim, FLASH_ATTN_MAX_NDIM);
  for (int i = 0; i < stored; ++i) {
    tensor.shape[i] = view.size(i);
    tensor.stride[i] = view.stride(i);
  }
}

[[noreturn]] void raise(const char* kind, const std::string& sentence) {
  throw tvm::ffi::Error(kind, sentence, "");
}

void check_status(flash_attn_status status) {
  if (status == FLASH_ATTN_OK) return;
  raise(status == FLASH_ATTN_OUT_OF_MEMORY ? "MemoryError" : "RuntimeError",
        flash_attn_last_error());
}

// Text of the library, where NULL tells that the call failed.
String checked_text(const char* text) {
  if (text == nullptr) check_status(FLASH_ATTN_INVALID_ARGUMENT);
  return text;
}

// ------------------------------------------------------------------------------------------------
// Calls with arguments by position, in an order that the caller chose by their names

// What was given for an argument; becomes whatever the member that it is assigned to is.
class Value {
 public:
  // `tensor` is where a tensor's description goes; it outlives the call.
  Value(std::string_view name, AnyView given, flash_attn_tensor* tensor)
      : name_(name), given_(given), tensor_(tensor) {}

  operator double() const { return as<double>("a number"); }      // NOLINT(google-explicit-*)
  operator int64_t() const { return as<int64_t>("an integer"); }  // NOLINT(google-explicit-*)
  // Out-of-range numbers stay out of range, for the library to reject.
  operator int32_t() const {  // NOLINT(google-explicit-*)
    return static_cast<int32_t>(std::clamp<int64_t>(*this, std::numeric_limits<int32_t>::min(),
                                                    std::numeric_limits<int32_t>::max()));
  }
  operator const flash_attn_tensor*() const {  // NOLINT(google-explicit-*)
    describe(as<TensorView>("a tensor or None"), *tensor_);
    return tensor_;
  }

 private:
  template <class T>
  T as(const char* expected) const {
    if (const auto value = given_.try_cast<T>()) return *value;
    raise("TypeError",
          std::string(name_) + " must be " + expected + ", got " + given_.GetTypeKey());
  }

  std::string_view name_;
  AnyView given_;
  flash_attn_tensor* tensor_;
};

template <class Args>
struct Argument {
  std::string_view name;
  bool is_tensor;
  void (*set)(Args&, const Value&);
};

// A function of a C interface, and the one that tells the workspace it needs; null: none.
template <class Args>
struct Entry {
  flash_attn_status (*run)(const Args*);
  flash_attn_status (*workspace_size)(const Args*, size_t*) = nullptr;
};

// The arguments of each struct of the C interfaces, its members; and
// with_function(name, visit) -> visit(Entry of this name).
template <class Args>
constexpr std::array<Argument<Args>, 0> kArguments{};
#include "generated/arguments.inc"

// Where a call's tensors lie: where the first of them does. The library rejects others.
struct Place {
  bool is_cuda = false;
  int device_id = 0;

  void see(const flash_attn_tensor& tensor) {
    if (seen_) return;
    seen_ = true;
    is_cuda = tensor.device_type == FLASH_ATTN_CUDA;
    device_id = is_cuda ? tensor.device_id : 0;
  }
  // The stream that the caller's framework works on now; tvm-ffi asks the framework when tensors
  // cross.
  void* current_stream() const {
    return is_cuda ? TVMFFIEnvGetStream(kDLCUDA, device_id) : nullptr;
  }

 private:
  bool seen_ = false;
};

// Whether CPU tensors of some thread may go to the emulated device.
std::atomic<bool> may_be_emulated{[] {
  const char* description = std::getenv("FLASH_ATTENTION_EMULATOR");
  return description != nullptr && *description != '\0';
}()};

// (bytes, device type of DLPack, device id) -> a tensor of uint8; set when the package is imported.
Function& allocator() {
  static auto& function = *new Function;
  return function;
}

// The workspace that a call needs, allocated by the caller's framework; null where none is needed,
// as always on the CPU. The framework may reuse it as soon as work on the current stream is done
// with it: it may go when the call returns.
template <class Args>
Any add_workspace(const Entry<Args>& entry, const Place& place, Args& args) {
  if constexpr (requires { args.workspace; }) {
    if (entry.workspace_size == nullptr || !(place.is_cuda || may_be_emulated)) return nullptr;
    check_status(entry.workspace_size(&args, &args.workspace_bytes));
    if (args.workspace_bytes == 0) return nullptr;
    Any tensor = allocator()(static_cast<int64_t>(args.workspace_bytes),
                             static_cast<int64_t>(place.is_cuda ? kDLCUDA : kDLCPU),
                             static_cast<int64_t>(place.device_id));
    args.workspace = tensor.cast<TensorView>().data_ptr();
    return tensor;
  }
  return nullptr;
}

// Arguments that are not in the order are NULL or 0; a null pointer in it takes an argument that
// the library does without.
template <class Args>
void call(const Entry<Args>& entry, const std::vector<const Argument<Args>*>& order,
          PackedArgs given) {
  const int count = static_cast<int>(order.size());
  if (given.size() != count) {
    raise("TypeError",
          "expected " + std::to_string(count) + " arguments, got " + std::to_string(given.size()));
  }
  std::array<flash_attn_tensor, kArguments<Args>.size()> tensors;
  Args args{};
  Place place;
  for (int i = 0; i < count; ++i) {
    const bool is_absent = order[i] == nullptr || (order[i]->is_tensor && given[i] == nullptr);
    if (is_absent) continue;
    flash_attn_tensor& tensor = tensors[order[i] - kArguments<Args>.data()];
    order[i]->set(args, {order[i]->name, given[i], &tensor});
    if (order[i]->is_tensor) place.see(tensor);
  }
  args.stream = place.current_stream();
  const Any workspace = add_workspace(entry, place, args);
  check_status(entry.run(&args));
}

template <class Args>
const Argument<Args>* find_argument(const std::string& name) {
  if (name == "_") return nullptr;
  const auto& all = kArguments<Args>;
  const auto found = std::ranges::find(all, name, &Argument<Args>::name);
  if (found == all.end()) raise("ValueError", "there is no argument " + name);
  return &*found;
}

// A function of a C interface that takes the arguments `names`, separated by spaces, by position;
// "_" stands for one that is not passed on.
Function bind(const String& function, const String& names) {
  return with_function(function, [&]<class Args>(const Entry<Args>& entry) {
    std::vector<const Argument<Args>*> order;
    std::istringstream words(names);
    for (std::string name; words >> name;) order.push_back(find_argument<Args>(name));
    return Function::FromPacked(
        [entry, order](PackedArgs given, Any*) { call<Args>(entry, order, given); });
  });
}

// The names of a function's arguments, separated by spaces.
String arguments(const String& function) {
  return with_function(function, []<class Args>(const Entry<Args>&) {
    std::string names;
    for (const auto& argument : kArguments<Args>) names.append(argument.name).append(" ");
    return String(names);
  });
}

// ------------------------------------------------------------------------------------------------

void set_cpu_isa(Optional<String> name) {
  check_status(flash_attn_set_cpu_isa(name.has_value() ? name.value().c_str() : nullptr));
}

void set_allocator(Function function) { allocator() = std::move(function); }

void use_emulator(String description, Optional<String> library) {
  if (!description.empty()) may_be_emulated = true;
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

TVM_FFI_DLL_EXPORT_TYPED_FUNC(bind, bind);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(arguments, arguments);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_cpu_isa, set_cpu_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isas, cpu_isas);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_isa, cpu_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cpu_threads, cpu_threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(kernels, kernels);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_allocator, set_allocator);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_emulator, use_emulator);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(emulator_counters, emulator_counters);
