#include "base/cuda_driver/emulated.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

namespace flash::cuda {
namespace {

// Functions of gpu_emulator.h.
using SetOption = int (*)(int device, const char* name, const char* value);
using Text = size_t (*)(int device, char* text, size_t size);
using Reset = void (*)(int device);

std::mutex& call_mutex() {
  static auto& mutex = *new std::mutex;
  return mutex;
}

// libgpu_emulator.so in the directory of the library that holds this function.
std::string library_beside_this() {
  Dl_info info;
  const std::string self =
      dladdr(reinterpret_cast<void*>(&library_beside_this), &info) != 0 ? info.dli_fname : "";
  return self.substr(0, self.rfind('/') + 1) + "libgpu_emulator.so";
}

Device& device_of_architecture(const Driver& driver, const std::string& architecture) {
  int count = 0;
  driver->device_get_count(&count);
  for (int i = 0; i < count; ++i) {
    Device& device = Device::get(driver, i);
    const std::string name = "sm_" + std::to_string(device.compute_capability());
    if (architecture == name || architecture == name + "a") return device;
  }
  fail("the emulator ", driver.library(), " has no device of architecture \"", architecture,
       "\": sm_80, sm_86, sm_89, sm_90a and sm_120 exist");
}

std::string text_of(const Device& device, const char* function) {
  const auto read = reinterpret_cast<Text>(device.driver().symbol(function));
  if (read == nullptr) return "";
  std::string text(read(device.ordinal(), nullptr, 0), '\0');
  read(device.ordinal(), text.data(), text.size() + 1);
  return text;
}

void set_option(const Device& device, const std::string& option) {
  const size_t equals = option.find('=');
  require(equals != std::string::npos, "option of the emulator without a value: \"", option, "\"");
  const std::string name = option.substr(0, equals), value = option.substr(equals + 1);
  const auto set = reinterpret_cast<SetOption>(device.driver().symbol("gpuEmulatorSetOption"));
  require(set != nullptr, "the emulator ", device.driver().library(), " has no options");
  const int result = set(device.ordinal(), name.c_str(), value.c_str());
  require(result == CUDA_SUCCESS, "the emulator does not take ", name, "=", value, ": ",
          text_of(device, "gpuEmulatorLastReport"));
}

// The architecture, then the options. A word that begins with a sign belongs to the option before
// it: checks=all,-proxy_fence.
std::vector<std::string> words_of(const std::string& description) {
  std::vector<std::string> words;
  std::istringstream rest(description);
  for (std::string word; std::getline(rest, word, ',');) {
    const bool continues = words.size() > 1 && (word[0] == '+' || word[0] == '-');
    if (continues) {
      words.back() += "," + word;
    } else {
      words.push_back(word);
    }
  }
  return words;
}

Device* find(const std::string& description, const std::string& library) {
  if (description.empty()) return nullptr;
  const Driver& driver = Driver::load(library.empty() ? library_beside_this() : library,
                                      "the emulated GPU's library, libgpu_emulator.so,");
  const std::vector<std::string> words = words_of(description);
  Device& device = device_of_architecture(driver, words.front());
  for (size_t i = 1; i < words.size(); ++i) set_option(device, words[i]);
  return &device;
}

// The process's own: of the environment variable, found at the first use.
Device* default_device() {
  static Device* const device = [] {
    const char* description = std::getenv("FLASH_ATTENTION_EMULATOR");
    return find(description != nullptr ? description : "", "");
  }();
  return device;
}

struct Choice {
  bool made = false;
  Device* device = nullptr;
};
thread_local Choice choice;

// Sorted, without overlap and without empty ranges.
std::vector<HostRange> merged(std::vector<HostRange> ranges) {
  std::erase_if(ranges, [](const HostRange& r) { return r.begin >= r.end; });
  std::sort(ranges.begin(), ranges.end(),
            [](const HostRange& a, const HostRange& b) { return a.begin < b.begin; });
  std::vector<HostRange> result;
  for (const HostRange& range : ranges) {
    if (!result.empty() && range.begin <= result.back().end) {
      result.back().end = std::max(result.back().end, range.end);
    } else {
      result.push_back(range);
    }
  }
  return result;
}

}  // namespace

Device* emulated_device() { return choice.made ? choice.device : default_device(); }

void use_emulator(const std::string& description, const std::string& library) {
  Device* const device = find(description, library);
  choice = {true, device};
  if (device == nullptr) return;
  const auto reset = reinterpret_cast<Reset>(device->driver().symbol("gpuEmulatorResetCounters"));
  if (reset != nullptr) reset(device->ordinal());
}

std::string emulator_counters() {
  const Device* device = emulated_device();
  return device == nullptr ? "" : text_of(*device, "gpuEmulatorCounters");
}

EmulatedCall::EmulatedCall(Device& device, std::vector<HostRange> ranges) : device_(device) {
  call_mutex().lock();
  try {
    for (const HostRange& range : merged(std::move(ranges))) {
      device.register_host(range.begin, static_cast<size_t>(range.end - range.begin));
      registered_.push_back(range);
    }
  } catch (...) {
    unregister();
    throw;
  }
}

EmulatedCall::~EmulatedCall() { unregister(); }

void EmulatedCall::unregister() noexcept {
  for (const HostRange& range : registered_) device_.unregister_host(range.begin);
  call_mutex().unlock();
}

void EmulatedCall::rethrow_with_report(const ApiError& error) const {
  const std::string report = text_of(device_, "gpuEmulatorLastReport");
  throw ApiError(error.status(), report.empty() ? error.what() : error.what() + ("\n" + report));
}

}  // namespace flash::cuda
