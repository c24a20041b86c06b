#include "fatbin.h"

#include <algorithm>
#include <charconv>
#include <cstring>

#include "lz4.h"

#if GPU_EMULATOR_HAVE_ZSTD
#include <zstd.h>
#endif

namespace gpu_emulator::fatbin {
namespace {

constexpr uint32_t kMagic = 0xba55ed50;
constexpr uint64_t kLz4Flag = 0x2000, kZstdFlag = 0x8000;
constexpr uint64_t kMaxTextBytes = uint64_t{256} << 20;  // far beyond any real module

struct Header {
  uint32_t magic;
  uint16_t version;
  uint16_t header_bytes;
  uint64_t payload_bytes;
};
static_assert(sizeof(Header) == kHeaderBytes);

struct EntryHeader {
  uint16_t kind;  // 1: PTX, 2: machine code
  uint16_t version;
  uint32_t header_bytes;
  uint64_t padded_payload_bytes;
  uint32_t compressed_bytes;  // 0 where the payload is plain
  uint32_t options_offset;
  uint16_t minor, major;  // of the PTX ISA
  uint32_t arch;
  uint32_t name_offset, name_bytes;
  uint64_t flags;
  uint64_t reserved;
  uint64_t text_bytes;  // decompressed; 0 where the payload is plain
};
static_assert(sizeof(EntryHeader) == 64);

template <typename T>
T read(Bytes bytes) {
  T value;
  std::memcpy(&value, bytes.data(), sizeof(T));
  return value;
}

Entry make_entry(const EntryHeader& header, Bytes payload) {
  Entry entry;
  entry.kind = header.kind == 1   ? Entry::Kind::kPtx
               : header.kind == 2 ? Entry::Kind::kMachineCode
                                  : Entry::Kind::kOther;
  entry.arch = static_cast<int>(std::min<uint32_t>(header.arch, 1000));
  entry.payload = payload;
  entry.text_bytes = payload.size();
  const uint64_t flags = header.flags & (kLz4Flag | kZstdFlag);
  if (flags == 0) return entry;
  if (header.compressed_bytes == 0 || header.compressed_bytes > payload.size()) {
    throw FatbinError("damaged fatbin: an entry is smaller than its compressed contents");
  }
  entry.compression = flags == kLz4Flag ? Entry::Compression::kLz4 : Entry::Compression::kZstd;
  entry.payload = payload.first(header.compressed_bytes);
  entry.text_bytes = header.text_bytes;
  return entry;
}

bool decompress(const Entry& entry, std::string& text) {
  const std::span<std::byte> output = std::as_writable_bytes(std::span(text));
  if (entry.compression == Entry::Compression::kLz4) {
    return decode_lz4_block(entry.payload, output) == output.size();
  }
#if GPU_EMULATOR_HAVE_ZSTD
  const size_t written =
      ZSTD_decompress(output.data(), output.size(), entry.payload.data(), entry.payload.size());
  return !ZSTD_isError(written) && written == output.size();
#else
  throw FatbinError(
      "the fatbin is compressed with zstd, which this build of the emulator lacks: compile the "
      "kernel with --compress-mode=speed or build the emulator with libzstd");
#endif
}

struct Target {
  int number = 0;   // 90
  char letter = 0;  // a, f, or 0
};

std::optional<Target> parse_target(std::string_view name) {
  if (!name.starts_with("sm_") && !name.starts_with("compute_")) return std::nullopt;
  name.remove_prefix(name.find('_') + 1);
  Target target;
  const auto result = std::from_chars(name.data(), name.data() + name.size(), target.number);
  const size_t letters = static_cast<size_t>(name.data() + name.size() - result.ptr);
  if (result.ec != std::errc() || letters > 1) return std::nullopt;
  if (letters == 1) target.letter = *result.ptr;
  return target;
}

std::string describe(const std::vector<Entry>& list) {
  std::string text;
  for (const Entry& entry : list) {
    if (entry.kind == Entry::Kind::kOther) continue;
    if (!text.empty()) text += ", ";
    text += entry.kind == Entry::Kind::kPtx ? "PTX for compute_" : "machine code for sm_";
    text += std::to_string(entry.arch);
  }
  return text.empty() ? "nothing" : text;
}

}  // namespace

std::optional<uint64_t> announced_size(Bytes first_bytes) {
  if (first_bytes.size() < sizeof(Header)) return std::nullopt;
  const Header header = read<Header>(first_bytes);
  if (header.magic != kMagic || header.header_bytes < sizeof(Header)) return std::nullopt;
  const uint64_t size = header.header_bytes + header.payload_bytes;
  return size < header.payload_bytes ? UINT64_MAX : size;
}

std::vector<Entry> entries(Bytes fatbin) {
  const auto size = announced_size(fatbin);
  if (!size) throw FatbinError("not a fatbin");
  const Header header = read<Header>(fatbin);
  if (*size > fatbin.size()) {
    throw FatbinError("truncated fatbin: " + std::to_string(fatbin.size()) + " bytes of " +
                      std::to_string(*size));
  }
  std::vector<Entry> result;
  Bytes rest = fatbin.subspan(header.header_bytes, header.payload_bytes);
  while (!rest.empty()) {
    if (rest.size() < sizeof(EntryHeader)) throw FatbinError("damaged fatbin: truncated entry");
    const EntryHeader entry = read<EntryHeader>(rest);
    const bool fits = entry.header_bytes >= sizeof(EntryHeader) &&
                      entry.header_bytes <= rest.size() &&
                      entry.padded_payload_bytes <= rest.size() - entry.header_bytes;
    if (!fits) throw FatbinError("damaged fatbin: an entry reaches beyond its end");
    result.push_back(
        make_entry(entry, rest.subspan(entry.header_bytes, entry.padded_payload_bytes)));
    rest = rest.subspan(entry.header_bytes + entry.padded_payload_bytes);
  }
  return result;
}

std::string text_of(const Entry& entry) {
  if (entry.kind != Entry::Kind::kPtx) throw FatbinError("the entry is not PTX");
  if (entry.compression == Entry::Compression::kNone) {
    const char* text = reinterpret_cast<const char*>(entry.payload.data());
    return std::string(text, strnlen(text, entry.payload.size()));
  }
  if (entry.text_bytes > kMaxTextBytes) throw FatbinError("damaged fatbin: PTX of absurd size");
  std::string text(entry.text_bytes, '\0');
  if (!decompress(entry, text)) throw FatbinError("damaged fatbin: compressed PTX is broken");
  text.resize(strnlen(text.data(), text.size()));
  return text;
}

std::string target_of(std::string_view ptx) {
  constexpr std::string_view kDirective = ".target";
  const size_t at = ptx.find(kDirective);
  if (at == std::string_view::npos) return "";
  const size_t begin = ptx.find_first_not_of(" \t", at + kDirective.size());
  if (begin == std::string_view::npos) return "";
  return std::string(ptx.substr(begin, ptx.find_first_of(" \t\r\n,;/", begin) - begin));
}

bool runs_on(std::string_view target, int major, int minor) {
  const auto parsed = parse_target(target);
  if (!parsed) return false;
  const int device = 10 * major + minor;
  if (parsed->letter == 'a') return parsed->number == device;
  if (parsed->letter == 'f') return parsed->number / 10 == major && parsed->number <= device;
  return parsed->letter == 0 && parsed->number <= device;
}

std::string best_ptx(Bytes fatbin, int major, int minor) {
  const std::vector<Entry> list = entries(fatbin);
  std::vector<Entry> candidates;
  std::copy_if(list.begin(), list.end(), std::back_inserter(candidates), [&](const Entry& entry) {
    return entry.kind == Entry::Kind::kPtx && entry.arch <= 10 * major + minor;
  });
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Entry& a, const Entry& b) { return a.arch > b.arch; });
  std::optional<std::string> best;
  int best_arch = 0;
  for (const Entry& entry : candidates) {
    if (best && entry.arch < best_arch) break;
    std::string text = text_of(entry);
    const std::string target = target_of(text);
    if (!runs_on(target, major, minor)) continue;
    const bool specific = target.ends_with('a');
    if (best && !specific) continue;
    best = std::move(text);
    best_arch = entry.arch;
    if (specific) break;
  }
  if (best) return *std::move(best);
  throw FatbinError("the fatbin has no PTX that runs on sm_" + std::to_string(10 * major + minor) +
                    "; it holds " + describe(list) +
                    ". Compile with -gencode arch=compute_NN,code=compute_NN");
}

}  // namespace gpu_emulator::fatbin
