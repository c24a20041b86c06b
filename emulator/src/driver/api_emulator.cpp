// gpuEmulator*: what this driver offers beyond CUDA's. None needs cuInit.

#include <algorithm>
#include <charconv>
#include <sstream>
#include <stdexcept>

#include "arguments.h"

#pragma GCC visibility push(default)
#include "gpu_emulator/gpu_emulator.h"
#pragma GCC visibility pop

namespace gpu_emulator::driver {
namespace {

bool is_device(int device) { return device >= 0 && device < Driver::kDevices; }

uint64_t number_of(const std::string& value, uint64_t most) {
  uint64_t number = 0;
  const char* end = value.data() + value.size();
  const auto result = std::from_chars(value.data(), end, number);
  if (result.ec != std::errc() || result.ptr != end || number > most) {
    fail(CUDA_ERROR_INVALID_VALUE,
         "'" + value.substr(0, 60) + "' is not a number from 0 to " + std::to_string(most) + ".");
  }
  return number;
}

void set_mode(Options& options, const std::string& value) {
  if (value == "eager") {
    options.mode = Mode::kEager;
  } else if (value == "late") {
    options.mode = Mode::kLate;
  } else if (value == "random") {
    options.mode = Mode::kRandom;
  } else {
    fail(CUDA_ERROR_INVALID_VALUE,
         "Option mode has no value '" + value.substr(0, 60) + "': it is eager, late or random.");
  }
}

void set_checks(Options& options, const std::string& value) {
  try {
    options.checks = exec::Checks::parse(value);
  } catch (const std::invalid_argument& error) {
    fail(CUDA_ERROR_INVALID_VALUE, error.what());
  }
}

// Texts by the numbers before them: "12 bar.sync 0;", a line each.
std::map<int, std::string> lines_of(const std::string& value) {
  std::map<int, std::string> lines;
  std::istringstream text(value);
  for (std::string entry; std::getline(text, entry);) {
    const size_t space = entry.find(' ');
    const auto line = static_cast<int>(number_of(entry.substr(0, space), INT32_MAX));
    lines[line] = space == std::string::npos ? "" : entry.substr(space + 1);
  }
  return lines;
}

void set_option(Options& options, const std::string& name, const std::string& value) {
  if (name == "mode") {
    set_mode(options, value);
  } else if (name == "seed") {
    options.seed = number_of(value, UINT64_MAX);
  } else if (name == "checks") {
    set_checks(options, value);
  } else if (name == "threads") {
    options.threads = static_cast<int>(number_of(value, UINT16_MAX));
  } else if (name == "count") {
    options.count = number_of(value, 1) == 1;
  } else if (name == "delete_line") {
    options.replaced_lines.clear();
    if (const int line = static_cast<int>(number_of(value, INT32_MAX))) {
      options.replaced_lines[line] = "";
    }
  } else if (name == "replace_lines") {
    options.replaced_lines = lines_of(value);
  } else if (name == "delete_in") {
    options.delete_in = value;
  } else if (name == "max_instructions") {
    options.max_instructions = static_cast<int64_t>(number_of(value, INT64_MAX));
  } else {
    fail(CUDA_ERROR_INVALID_VALUE, "There is no option '" + name.substr(0, 60) + "'.");
  }
}

// Copies what fits, with a terminating zero; returns the whole length.
size_t copy_out(const std::string& text, char* out, size_t size) {
  if (out && size > 0) {
    const size_t length = std::min(text.size(), size - 1);
    safe_copy(out, text.substr(0, length).c_str(), length + 1);
  }
  return text.size();
}

// A text of a device; "" where there is none or the text cannot be made.
template <typename Text>
size_t copy_text(int device, char* out, size_t size, Text text) {
  std::string result;
  if (is_device(device)) {
    Driver& state = driver();
    const std::lock_guard lock(state.mutex);
    try {
      result = text(state.devices[device]);
    } catch (const std::exception&) {
      result.clear();
    }
  }
  return copy_out(result, out, size);
}

}  // namespace
}  // namespace gpu_emulator::driver

using namespace gpu_emulator::driver;

int gpuEmulatorSetOption(int device, const char* name, const char* value) {
  return guarded_uninitialised([&](Driver& state) {
    const auto key = take_string(name, "name"), text = take_string(value, "value");
    Device& target = state.device(device);
    try {
      if (key == "sms") {
        if (number_of(text, 1024) == 0) fail(CUDA_ERROR_INVALID_VALUE, "A device has an SM.");
        target.set_sms(static_cast<int>(number_of(text, 1024)));
      } else {
        set_option(target.options, key, text);
      }
    } catch (const ApiError& error) {
      target.report = error.text;
      throw;
    }
  });
}

size_t gpuEmulatorLastReport(int device, char* text, size_t size) {
  return copy_text(device, text, size, [](const Device& of) { return of.report; });
}

size_t gpuEmulatorCounters(int device, char* json, size_t size) {
  return copy_text(device, json, size, [](const Device& of) { return of.counters.json(); });
}

size_t gpuEmulatorCountersTable(int device, char* table, size_t size) {
  return copy_text(device, table, size, [](const Device& of) { return of.counters.table(); });
}

void gpuEmulatorResetCounters(int device) {
  if (!is_device(device)) return;
  Driver& state = driver();
  const std::lock_guard lock(state.mutex);
  state.devices[device].counters = {};
}
