// Shared memory by its 32-bit addresses.
#pragma once

#include <cstdint>

#include "base/host_device.h"

namespace flash::ptx {

// The address that the instructions below take (PTX ISA, "Data Movement and Conversion
// Instructions: cvta").
FLASH_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ldmatrix.sync.aligned.m8n8.x4: four 8 x 8 blocks of 16-bit elements; `row` + kOffset is the
// address of the 16-byte row that fragments.h names for this lane (PTX ISA, "Warp-level matrix load
// instruction: ldmatrix").
template <int kOffset>
FLASH_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row), "n"(kOffset)
               : "memory");
}

// The same, each block transposed.
template <int kOffset>
FLASH_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row), "n"(kOffset)
               : "memory");
}

// stmatrix.sync.aligned.m8n8.x4: the way back; `row` + kOffset is where this lane's 16-byte row
// goes (PTX ISA, "Warp-level matrix store instruction: stmatrix"; sm_90).
template <int kOffset>
FLASH_DEVICE void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0 + %1], {%2, %3, %4, %5};" ::"r"(row),
               "n"(kOffset), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ld.shared, st.shared (PTX ISA, "Data Movement and Conversion Instructions: ld", "st").
FLASH_DEVICE void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

FLASH_DEVICE void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}

FLASH_DEVICE void store_shared(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}

FLASH_DEVICE void store_shared(uint32_t address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

FLASH_DEVICE void store_shared(uint32_t address, uint16_t x) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
}

FLASH_DEVICE uint16_t load_shared_2_bytes(uint32_t address) {
  uint16_t x;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
  return x;
}

FLASH_DEVICE uint32_t load_shared_byte(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

FLASH_DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}

FLASH_DEVICE float2 load_shared_2_floats(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

FLASH_DEVICE uint4 load_shared_16_bytes(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

}  // namespace flash::ptx
