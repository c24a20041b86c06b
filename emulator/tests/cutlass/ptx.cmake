# PTX of the CUTLASS micro-kernels, where nvcc and CUTLASS's headers are there; without them, and under sanitizers (a
# minute of nvcc for no code of ours), the tests that need it are skipped.
find_package(Python3 COMPONENTS Interpreter QUIET)
if(Python3_FOUND AND NOT GPU_EMULATOR_CUTLASS_INCLUDE)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c
            "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
    OUTPUT_VARIABLE cutlass_library ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
find_path(GPU_EMULATOR_CUTLASS_INCLUDE cute/tensor.hpp HINTS ${cutlass_library}/source/include
          DOC "Folder of CUTLASS's headers (PyPI: nvidia-cutlass), for tests")
mark_as_advanced(GPU_EMULATOR_CUTLASS_INCLUDE)

set(ptx_folder ${CMAKE_CURRENT_BINARY_DIR}/cutlass)
if(TARGET gpu_emulator_cutlass_tests)
  target_compile_definitions(gpu_emulator_cutlass_tests PRIVATE GPU_EMULATOR_CUTLASS_PTX="${ptx_folder}")
endif()
if(NOT FLASH_ATTN_NVCC OR NOT GPU_EMULATOR_CUTLASS_INCLUDE OR FLASH_ATTN_SANITIZE)
  message(STATUS "Emulated GPU: no nvcc or no CUTLASS headers: tests with CUTLASS are skipped")
  return()
endif()
file(MAKE_DIRECTORY ${ptx_folder})
set(ptx_files "")
foreach(kernel wgmma_layouts:90a tma_gemm:90a sm80_gemm:80)
  string(REPLACE ":" ";" kernel ${kernel})
  list(GET kernel 0 name)
  list(GET kernel 1 arch)
  add_custom_command(
    OUTPUT ${ptx_folder}/${name}.ptx
    COMMAND ${FLASH_ATTN_NVCC} -ptx -std=c++17 -w --expt-relaxed-constexpr -lineinfo -arch=compute_${arch}
            -I${GPU_EMULATOR_CUTLASS_INCLUDE} ${CMAKE_CURRENT_SOURCE_DIR}/cutlass/${name}.cu -o ${ptx_folder}/${name}.ptx
    DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/cutlass/${name}.cu
    COMMENT "PTX of ${name}.cu"
    VERBATIM)
  list(APPEND ptx_files ${ptx_folder}/${name}.ptx)
endforeach()
add_custom_target(gpu_emulator_cutlass_ptx DEPENDS ${ptx_files})
add_dependencies(gpu_emulator_cutlass_tests gpu_emulator_cutlass_ptx)
