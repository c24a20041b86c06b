#pragma once

// Reads what nvcc and fatbinary write: a header, then entries of PTX or machine code, each plain or
// compressed. NVIDIA publishes no description; the fields below were found by compiling with each
// --compress-mode of nvcc 13.0.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace gpu_emulator::fatbin {

using Bytes = std::span<const std::byte>;

class FatbinError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline constexpr size_t kHeaderBytes = 16;

// The size of the fatbin that these first bytes announce, header included; nothing if they do not
// begin one.
std::optional<uint64_t> announced_size(Bytes first_bytes);

struct Entry {
  enum class Kind : uint8_t { kPtx, kMachineCode, kOther };
  enum class Compression : uint8_t { kNone, kLz4, kZstd };
  Kind kind = Kind::kOther;
  Compression compression = Compression::kNone;
  int arch = 0;  // 80, 90, ... without a letter
  Bytes payload;
  uint64_t text_bytes = 0;  // decompressed
};

// The entries of a fatbin, in order. Throws FatbinError, and nothing else, whatever the bytes.
std::vector<Entry> entries(Bytes fatbin);

// The text of a PTX entry. Throws FatbinError.
std::string text_of(const Entry& entry);

// "sm_90a" of PTX text, "" if there is none.
std::string target_of(std::string_view ptx);

// Whether PTX for `target` can run on compute capability major.minor: up to it; with the letter a
// on that one alone, with f on that major version.
bool runs_on(std::string_view target, int major, int minor);

// The PTX of the fatbin that fits best: of the highest target that runs on the device, the
// architecture-specific one if there is a choice. Throws FatbinError, naming what is there instead.
std::string best_ptx(Bytes fatbin, int major, int minor);

// The fatbins in the section .nv_fatbin of a 64-bit ELF file (an executable, a library or an
// object file). Empty if there are none; throws FatbinError for a damaged file.
std::vector<Bytes> embedded_fatbins(Bytes elf_file);

}  // namespace gpu_emulator::fatbin
