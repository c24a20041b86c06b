#include "system_calls.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "memory.h"
#include "report.h"

namespace gpu_emulator::exec {
namespace {

uint64_t argument(Warp& warp, uint64_t place, int lane, size_t bytes = 8) {
  uint64_t value = 0;
  std::memcpy(&value, warp.local_memory(lane) + place, bytes);
  return value;
}

AccessForm bytes_at(uint32_t bytes) {
  AccessForm form;
  form.bytes = bytes;
  form.counted = false;
  return form;
}

std::string read_string(Warp& warp, int lane, uint64_t address) {
  constexpr size_t kLongest = 4096;
  std::string text;
  while (text.size() < kLongest) {
    const char c = static_cast<char>(*resolve_one(warp, bytes_at(1), lane, address + text.size()));
    if (!c) break;
    text += c;
  }
  return text;
}

// One conversion of a printf format: its text and what it converts.
struct Conversion {
  std::string text;
  char kind;
  bool is_long;
};

constexpr const char* kLongModifiers = "lzjt";  // 64 bits; written again as ll below

Conversion next_conversion(const std::string& format_text, size_t* position) {
  Conversion conversion = {"%", 0, false};
  size_t i = *position + 1;
  while (i < format_text.size() && !std::strchr("diouxXeEfFgGaAcspn%", format_text[i])) {
    if (std::strchr(kLongModifiers, format_text[i])) {
      conversion.is_long = true;
    } else if (std::strchr("0123456789+- #.*", format_text[i])) {
      conversion.text += format_text[i];
    }
    ++i;
  }
  if (i < format_text.size()) conversion.kind = format_text[i++];
  *position = i;
  return conversion;
}

// The arguments lie in a buffer in local memory, each aligned to its size.
class Arguments {
 public:
  Arguments(Warp& warp, int lane, uint64_t address) : warp_(warp), lane_(lane), next_(address) {}
  uint64_t take(uint32_t bytes) {
    next_ = (next_ + bytes - 1) / bytes * bytes;
    uint64_t value = 0;
    std::memcpy(&value, resolve_one(warp_, bytes_at(bytes), lane_, next_), bytes);
    next_ += bytes;
    return value;
  }

 private:
  Warp& warp_;
  int lane_;
  uint64_t next_;
};

// Widths and precisions above 9999 become 9999: the kernel's text must not decide how much memory
// the process takes.
std::string with_bounded_numbers(const std::string& conversion) {
  constexpr size_t kDigits = 4;
  std::string bounded;
  for (size_t i = 0; i < conversion.size();) {
    const size_t end = std::min(conversion.find_first_not_of("0123456789", i), conversion.size());
    const size_t first = std::min(conversion.find_first_not_of('0', i), end);  // not a flag
    bounded += conversion.substr(i, first - i > 0);
    bounded += end - first > kDigits ? "9999" : conversion.substr(first, end - first);
    if (end < conversion.size()) bounded += conversion[end];
    i = end + 1;
  }
  return bounded;
}

std::string convert(Warp& warp, int lane, Conversion conversion, Arguments& arguments) {
  for (size_t star; (star = conversion.text.find('*')) != std::string::npos;) {
    conversion.text.replace(star, 1, std::to_string(static_cast<int32_t>(arguments.take(4))));
  }
  conversion.text = with_bounded_numbers(conversion.text);
  switch (conversion.kind) {
    case '%':
      return "%";
    case 's':
      return format((conversion.text + "s").c_str(),
                    read_string(warp, lane, arguments.take(8)).c_str());
    case 'p':
      return format((conversion.text + "s").c_str(),
                    format("0x%llx", static_cast<unsigned long long>(arguments.take(8))).c_str());
    case 'c':
      return format((conversion.text + "c").c_str(), static_cast<int>(arguments.take(4)));
    case 'd':
    case 'i': {
      const long long value = conversion.is_long ? static_cast<long long>(arguments.take(8))
                                                 : static_cast<int32_t>(arguments.take(4));
      return format((conversion.text + "lld").c_str(), value);
    }
    case 'o':
    case 'u':
    case 'x':
    case 'X': {
      const unsigned long long value = arguments.take(conversion.is_long ? 8 : 4);
      return format((conversion.text + "ll" + conversion.kind).c_str(), value);
    }
    case 0:
    case 'n':
      return "";
    default: {
      const uint64_t bits = arguments.take(8);
      double value;
      std::memcpy(&value, &bits, 8);
      return format((conversion.text + conversion.kind).c_str(), value);
    }
  }
}

// int vprintf(const char* format, void* arguments): prints lane by lane.
void run_vprintf(Warp& warp, const std::vector<uint64_t>& places, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const std::string text = read_string(warp, lane, argument(warp, places.at(0), lane));
    Arguments arguments(warp, lane, argument(warp, places.at(1), lane));
    std::string out;
    for (size_t i = 0; i < text.size();) {
      if (text[i] == '%') {
        const Conversion conversion = next_conversion(text, &i);
        out += convert(warp, lane, conversion, arguments);
      } else {
        out += text[i++];
      }
    }
    std::fwrite(out.data(), 1, out.size(), stdout);
    if (places.size() > 2) {
      const auto length = static_cast<uint32_t>(out.size());
      std::memcpy(warp.local_memory(lane) + places[2], &length, 4);
    }
  });
  std::fflush(stdout);
}

// void __assertfail(message, file, unsigned line, function, size_t char_size)
[[noreturn]] void run_assertfail(Warp& warp, const std::vector<uint64_t>& places, uint32_t mask) {
  const int lane = first_lane(mask);
  auto text = [&](size_t i) { return read_string(warp, lane, argument(warp, places.at(i), lane)); };
  const auto line = static_cast<uint32_t>(argument(warp, places.at(2), lane, 4));
  fail(warp, lane, ReportKind::kAssertion,
       text(1) + ":" + std::to_string(line) + ": " + text(3) + ": assertion `" + text(0) +
           "` failed.");
}

}  // namespace

void run_system_call(Warp& warp, const std::string& name, const std::vector<uint64_t>& places,
                     uint32_t mask) {
  if (name == "vprintf" && places.size() >= 2) {
    run_vprintf(warp, places, mask);
  } else if (name == "__assertfail" && places.size() >= 4) {
    run_assertfail(warp, places, mask);
  } else {
    fail(warp, first_lane(mask), ReportKind::kUnsupported,
         "Call of " + name + ", which has no body in this module.");
  }
}

}  // namespace gpu_emulator::exec
