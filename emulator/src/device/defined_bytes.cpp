#include "defined_bytes.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace gpu_emulator {
namespace {

constexpr auto kRelaxed = std::memory_order_relaxed;

}  // namespace

void DefinedBytes::Free::operator()(uint64_t* words) const { std::free(words); }

DefinedBytes::DefinedBytes(uint64_t begin, uint64_t bytes)
    : begin_(begin),
      bytes_(bytes),
      words_(static_cast<uint64_t*>(std::calloc(bytes / kWordBytes + 1, sizeof(uint64_t)))) {
  if (!words_) throw std::bad_alloc();
}

uint64_t DefinedBytes::word(uint64_t index) const {
  return std::atomic_ref(words_[index]).load(kRelaxed);
}

void DefinedBytes::change(uint64_t address, uint64_t bytes, bool defined) {
  for (uint64_t at = address - begin_, end = at + bytes; at < end;) {
    const uint64_t index = at / kWordBytes, first = at % kWordBytes;
    const uint64_t count = std::min(kWordBytes - first, end - at);
    const uint64_t bits = (count == kWordBytes ? ~uint64_t{0} : (uint64_t{1} << count) - 1)
                          << first;
    const std::atomic_ref word(words_[index]);
    const uint64_t before = word.load(kRelaxed);
    if (defined && (bits & ~before)) word.fetch_or(bits, kRelaxed);
    if (!defined && (bits & before)) word.fetch_and(~bits, kRelaxed);
    at += count;
  }
}

void DefinedBytes::set(uint64_t address, uint64_t bytes) {
  if (all()) return;
  if (address == begin_ && bytes >= bytes_) {
    set_all();
  } else {
    change(address, bytes, true);
  }
}

void DefinedBytes::forget(uint64_t address, uint64_t bytes) {
  if (all()) {
    change(begin_, bytes_, true);
    all_.store(false, kRelaxed);
  }
  change(address, bytes, false);
}

void DefinedBytes::copy(uint64_t address, uint64_t bytes, const DefinedBytes* from,
                        uint64_t source) {
  if (!from || from->all()) {
    set(address, bytes);
    return;
  }
  for (uint64_t done = 0; done < bytes; done += kWordBytes) {
    const uint64_t count = std::min(kWordBytes, bytes - done);
    const uint64_t undefined = from->undefined(source + done, count);
    change(address + done, count, true);
    for (uint64_t i = 0; i < count; ++i) {
      if (undefined >> i & 1) forget(address + done + i, 1);
    }
  }
}

uint64_t DefinedBytes::undefined(uint64_t address, uint64_t bytes) const {
  if (all()) return 0;
  bytes = std::min(bytes, kWordBytes);
  const uint64_t at = address - begin_, first = at % kWordBytes;
  uint64_t defined = word(at / kWordBytes) >> first;
  if (first + bytes > kWordBytes) defined |= word(at / kWordBytes + 1) << (kWordBytes - first);
  const uint64_t mask = bytes == kWordBytes ? ~uint64_t{0} : (uint64_t{1} << bytes) - 1;
  return ~defined & mask;
}

}  // namespace gpu_emulator
