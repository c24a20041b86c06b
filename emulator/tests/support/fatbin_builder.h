#pragma once

// Fatbins made by hand, with the fields that the reader looks at; fatbin.cpp describes them.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace gpu_emulator::testing_support {

class FatbinBuilder {
 public:
  FatbinBuilder() : bytes_(kHeaderBytes) {
    put<uint32_t>(0, 0xba55ed50);
    put<uint16_t>(4, 1);
    put<uint16_t>(6, kHeaderBytes);
  }

  void add_ptx(int arch, const std::string& text) { add(1, arch, 0, text, 0); }
  void add_machine_code(int arch) {
    add(2, arch, 0,
        "\x7f"
        "ELF",
        0);
  }
  // A block of literals alone: valid LZ4 that is not smaller.
  void add_lz4_ptx(int arch, const std::string& text) {
    std::string block = "\xf0";
    size_t rest = text.size() - 15;
    for (; rest >= 255; rest -= 255) block += '\xff';
    block += static_cast<char>(rest);
    add(1, arch, 0x2000, block + text, text.size());
  }

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  static constexpr size_t kHeaderBytes = 16, kEntryBytes = 64;

  template <typename T>
  void put(size_t offset, T value) {
    std::memcpy(bytes_.data() + offset, &value, sizeof(T));
  }

  void add(uint16_t kind, int arch, uint64_t flags, const std::string& payload,
           uint64_t text_bytes) {
    const size_t entry = bytes_.size();
    const size_t padded = (payload.size() + 8) / 8 * 8;
    bytes_.resize(entry + kEntryBytes + padded);
    put<uint16_t>(entry, kind);
    put<uint16_t>(entry + 2, 0x101);
    put<uint32_t>(entry + 4, kEntryBytes);
    put<uint64_t>(entry + 8, padded);
    put<uint32_t>(entry + 16, text_bytes ? static_cast<uint32_t>(payload.size()) : 0);
    put<uint32_t>(entry + 28, static_cast<uint32_t>(arch));
    put<uint64_t>(entry + 40, 0x11 | flags);
    put<uint64_t>(entry + 56, text_bytes);
    std::memcpy(bytes_.data() + entry + kEntryBytes, payload.data(), payload.size());
    put<uint64_t>(8, bytes_.size() - kHeaderBytes);
  }

  std::vector<std::byte> bytes_;
};

}  // namespace gpu_emulator::testing_support
