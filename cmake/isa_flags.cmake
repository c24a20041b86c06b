# The compiler flags of each instruction set: kernels_<isa>.cpp and kernels_<isa>_*.cpp are compiled once with these, and with nothing that
# depends on the building machine. Which set is used is decided when the library is loaded.

set(FLASH_ATTN_AVX2_FLAGS -mavx2 -mfma -mf16c)
set(FLASH_ATTN_AVX512_FLAGS -mavx512f -mavx512bw -mavx512dq -mavx512vl ${FLASH_ATTN_AVX2_FLAGS}
                            -mprefer-vector-width=512)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # Its own AVX-512 header warns: https://gcc.gnu.org/PR105593
  list(APPEND FLASH_ATTN_AVX512_FLAGS -Wno-uninitialized -Wno-maybe-uninitialized)
endif()
set(FLASH_ATTN_AVX512BF16_FLAGS ${FLASH_ATTN_AVX512_FLAGS} -mavx512bf16)
set(FLASH_ATTN_CPUINFO_AVX512 avx512vl)
set(FLASH_ATTN_CPUINFO_AVX512BF16 avx512_bf16)
set(FLASH_ATTN_CPUINFO_AMX amx_bf16)
# Tile instructions are written in assembly: the assembler needs to know them (binutils 2.34, LLVM 12), not the compiler.
set(FLASH_ATTN_AMX_FLAGS ${FLASH_ATTN_AVX512BF16_FLAGS})

# Software of AVX2 that stands for them in tests. Vectors wider than the instruction set's cross no call: all functions that
# take one are inlined. -O1 halves their minutes of compiling, for seconds that the tests take longer.
set(FLASH_ATTN_WIDE16_FLAGS ${FLASH_ATTN_AVX2_FLAGS} -Wno-psabi -O1)
set(FLASH_ATTN_SOFT_DOT_FLAGS ${FLASH_ATTN_WIDE16_FLAGS})
set(FLASH_ATTN_SOFT_TILES_FLAGS ${FLASH_ATTN_WIDE16_FLAGS})

# Whether this machine runs what is compiled for /proc/cpuinfo's `flag`; or that does not matter.
function(flash_attn_wants_isa flag result)
  set(${result} TRUE PARENT_SCOPE)
  if(FLASH_ATTN_RUNNABLE_ISAS)
    file(STRINGS /proc/cpuinfo flags REGEX "^flags.* ${flag}( |$)" LIMIT_COUNT 1)
    if(flags STREQUAL "")
      set(${result} FALSE PARENT_SCOPE)
    endif()
  endif()
endfunction()

set(FLASH_ATTN_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND FLASH_ATTN_ISAS avx2)
  foreach(isa avx512 avx512bf16 amx)
    string(TOUPPER ${isa} ISA)
    flash_attn_wants_isa(${FLASH_ATTN_CPUINFO_${ISA}} FLASH_ATTN_WANTS_${ISA})
  endforeach()
  if(FLASH_ATTN_SOFTWARE_ISAS AND NOT (FLASH_ATTN_RUNNABLE_ISAS AND FLASH_ATTN_WANTS_AMX))
    list(APPEND FLASH_ATTN_ISAS wide16 soft_dot soft_tiles)
  endif()
  foreach(isa avx512 avx512bf16)
    string(TOUPPER ${isa} ISA)
    if(FLASH_ATTN_WANTS_${ISA})
      list(APPEND FLASH_ATTN_ISAS ${isa})
    endif()
  endforeach()
  include(CheckCXXSourceCompiles)
  check_cxx_source_compiles("int main() { asm volatile(\"tdpbf16ps %tmm0, %tmm1, %tmm2\"); }"
                            FLASH_ATTN_ASSEMBLER_HAS_AMX)
  if(FLASH_ATTN_WANTS_AMX AND FLASH_ATTN_ASSEMBLER_HAS_AMX AND CMAKE_SYSTEM_NAME STREQUAL Linux)
    list(APPEND FLASH_ATTN_ISAS amx)
  endif()
endif()

# Adds the units of every instruction set in the directories to `target`, worst set first, and defines FLASH_ATTN_HAVE_<ISA> for each that
# is not the baseline.
function(flash_attn_add_isa_units target)
  foreach(isa IN LISTS FLASH_ATTN_ISAS)
    string(TOUPPER ${isa} ISA)
    list(TRANSFORM ARGN APPEND /kernels_${isa}.cpp OUTPUT_VARIABLE plain)
    list(TRANSFORM ARGN APPEND /kernels_${isa}_*.cpp OUTPUT_VARIABLE suffixed)
    file(GLOB units CONFIGURE_DEPENDS ${plain} ${suffixed})
    target_sources(${target} PRIVATE ${units})
    if(NOT isa STREQUAL baseline)
      set_source_files_properties(${units} PROPERTIES COMPILE_OPTIONS "${FLASH_ATTN_${ISA}_FLAGS}")
      target_compile_definitions(${target} PRIVATE FLASH_ATTN_HAVE_${ISA})
    endif()
  endforeach()
endfunction()
