#pragma once

#include <elf.h>

#include <cstddef>
#include <cstring>
#include <span>
#include <string>

namespace gpu_emulator::testing_support {

// A 64-bit ELF file with one section .nv_fatbin of these bytes.
inline std::string elf_with_fatbins(std::span<const std::byte> section) {
  const std::string names("\0.nv_fatbin\0.shstrtab", 22);
  const size_t data_at = sizeof(Elf64_Ehdr), names_at = data_at + section.size();
  Elf64_Ehdr header = {};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_shoff = names_at + names.size();
  header.e_shentsize = sizeof(Elf64_Shdr);
  header.e_shnum = 3;
  header.e_shstrndx = 2;
  Elf64_Shdr sections[3] = {};
  sections[1].sh_name = 1;
  sections[1].sh_type = SHT_PROGBITS;
  sections[1].sh_offset = data_at;
  sections[1].sh_size = section.size();
  sections[2].sh_name = 12;
  sections[2].sh_type = SHT_STRTAB;
  sections[2].sh_offset = names_at;
  sections[2].sh_size = names.size();
  std::string file(reinterpret_cast<const char*>(&header), sizeof(header));
  file.append(reinterpret_cast<const char*>(section.data()), section.size());
  file += names;
  return file.append(reinterpret_cast<const char*>(sections), sizeof(sections));
}

}  // namespace gpu_emulator::testing_support
