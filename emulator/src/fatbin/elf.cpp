// Fatbins embedded in ELF files, as nvcc's host objects and the libraries linked from them hold
// them.

#include <elf.h>

#include <algorithm>
#include <cstring>

#include "fatbin.h"

namespace gpu_emulator::fatbin {
namespace {

template <typename T>
T read_at(Bytes file, uint64_t offset) {
  if (offset > file.size() || sizeof(T) > file.size() - offset) {
    throw FatbinError("damaged ELF file: it ends inside a header");
  }
  T value;
  std::memcpy(&value, file.data() + offset, sizeof(T));
  return value;
}

Bytes section_bytes(Bytes file, const Elf64_Shdr& section) {
  if (section.sh_type == SHT_NOBITS) return {};
  if (section.sh_offset > file.size() || section.sh_size > file.size() - section.sh_offset) {
    throw FatbinError("damaged ELF file: a section reaches beyond its end");
  }
  return file.subspan(section.sh_offset, section.sh_size);
}

bool has_name(Bytes names, const Elf64_Shdr& section, std::string_view name) {
  if (section.sh_name >= names.size()) return false;
  const char* begin = reinterpret_cast<const char*>(names.data()) + section.sh_name;
  return std::string_view(begin, strnlen(begin, names.size() - section.sh_name)) == name;
}

// Fatbins lie one after the other, with zeros between them.
void split(Bytes section, std::vector<Bytes>& result) {
  constexpr size_t kAlignment = 8;
  while (section.size() >= kHeaderBytes) {
    const auto size = announced_size(section);
    if (!size) {
      section = section.subspan(kAlignment);
      continue;
    }
    if (*size > section.size()) throw FatbinError("damaged ELF file: truncated fatbin");
    result.push_back(section.first(*size));
    const uint64_t step = (*size + kAlignment - 1) / kAlignment * kAlignment;
    section = section.subspan(std::min<uint64_t>(step, section.size()));
  }
}

}  // namespace

std::vector<Bytes> embedded_fatbins(Bytes file) {
  const auto header = read_at<Elf64_Ehdr>(file, 0);
  if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 ||
      header.e_shentsize != sizeof(Elf64_Shdr)) {
    throw FatbinError("not a 64-bit ELF file");
  }
  const auto section = [&](uint64_t index) {
    // No overflow: e_shoff is checked against the file's size, the index has 16 bits.
    if (header.e_shoff > file.size()) throw FatbinError("damaged ELF file: no section headers");
    return read_at<Elf64_Shdr>(file, header.e_shoff + index * sizeof(Elf64_Shdr));
  };
  std::vector<Bytes> result;
  if (header.e_shnum == 0) return result;
  const Bytes names = section_bytes(file, section(header.e_shstrndx));
  for (uint64_t i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr candidate = section(i);
    if (has_name(names, candidate, ".nv_fatbin")) split(section_bytes(file, candidate), result);
  }
  return result;
}

}  // namespace gpu_emulator::fatbin
