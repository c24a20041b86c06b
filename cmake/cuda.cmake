# The CUDA kernels: every line of src/<backend>/kernels.inc becomes a translation unit in the build folder, nvcc makes a
# fatbin of it (machine code for sm_80, PTX for newer devices), and one assembler file embeds them all. Nothing links
# against CUDA: the driver is found at run time.

# What stands in the way of building them, "" if nothing does. 12.8 is the first nvcc with --compress-mode.
set(cuda_lacks "")
if(NOT FLASH_ATTN_CUDA)
  set(cuda_lacks "FLASH_ATTN_CUDA is off")
elseif(NOT FLASH_ATTN_NVCC)
  set(cuda_lacks "nvcc not found")
elseif(NOT FLASH_ATTN_CUDA_VERSION VERSION_GREATER_EQUAL 12.8)
  set(cuda_lacks "${FLASH_ATTN_NVCC} is nvcc \"${FLASH_ATTN_CUDA_VERSION}\", older than 12.8")
elseif(NOT FLASH_ATTN_CUDA_INCLUDE)
  set(cuda_lacks "no cuda.h found for ${FLASH_ATTN_NVCC}")
endif()

set(FLASH_ATTN_HAVE_CUDA FALSE)
if(cuda_lacks STREQUAL "")
  set(FLASH_ATTN_HAVE_CUDA TRUE)
  message(STATUS "CUDA: building the kernels with nvcc ${FLASH_ATTN_CUDA_VERSION} (${FLASH_ATTN_NVCC})")
  enable_language(ASM)
elseif(FLASH_ATTN_CUDA STREQUAL AUTO)
  message(STATUS "CUDA: ${cuda_lacks}: building without CUDA kernels; "
                 "to have them without a toolkit: FLASH_ATTN_CUDA=PYPI pip install .")
elseif(FLASH_ATTN_CUDA STREQUAL PYPI)
  message(FATAL_ERROR "FLASH_ATTN_CUDA is PYPI, but in the environment of ${Python_EXECUTABLE} ${cuda_lacks}: "
                      "it needs PyPI's packages nvidia-cuda-nvcc and nvidia-cuda-runtime")
elseif(FLASH_ATTN_CUDA)
  message(FATAL_ERROR "FLASH_ATTN_CUDA is on, but ${cuda_lacks}: put nvcc on PATH or set FLASH_ATTN_NVCC")
else()
  message(STATUS "CUDA: ${cuda_lacks}: building without CUDA kernels")
endif()

# LZ4, which every driver and every build of the emulated GPU reads; nvcc 13's own choice, zstd, needs newer drivers.
set(FLASH_ATTN_NVCC_FLAGS
    -fatbin -std=c++20 -O3 -lineinfo --compress-mode=speed -gencode arch=compute_80,code=sm_80
    -gencode arch=compute_80,code=compute_80 -Xptxas -v,--warn-on-spills,--warn-on-local-memory-usage)

# Compiles the kernels of src/sm80/kernels.inc and adds them, embedded, to `target`, with the host's side of the backend.
function(flash_attn_add_cuda_kernels target)
  set(src ${PROJECT_SOURCE_DIR}/csrc/flash_attn/src)
  set(out ${CMAKE_BINARY_DIR}/cuda)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${src}/sm80/kernels.inc)
  file(STRINGS ${src}/sm80/kernels.inc lines REGEX "^FLASH_SM80_FWD")
  set(embedding "")
  foreach(line IN LISTS lines)
    string(REGEX MATCH "\\((.*), (.*), (.*)\\)" line ${line})
    set(KERNEL_DTYPE ${CMAKE_MATCH_1})
    set(KERNEL_HEAD_DIM ${CMAKE_MATCH_2})
    set(KERNEL_MASK ${CMAKE_MATCH_3})
    set(name flash_fwd_sm80_${KERNEL_DTYPE}_d${KERNEL_HEAD_DIM}_${KERNEL_MASK})
    set(KERNEL_NAME ${name})
    configure_file(${src}/sm80/kernel.cu.in ${out}/${name}.cu @ONLY)
    add_custom_command(
      OUTPUT ${out}/${name}.fatbin ${out}/${name}.csv
      COMMAND ${CMAKE_COMMAND} "-DNVCC=${FLASH_ATTN_NVCC}" "-DFLAGS=${FLASH_ATTN_NVCC_FLAGS}" -DHOST=${CMAKE_CXX_COMPILER}
              -DWERROR=$<BOOL:${FLASH_ATTN_WERROR}> -DSRC=${src} -DNAME=${name} -DOUT=${out}
              -P ${PROJECT_SOURCE_DIR}/cmake/compile_kernel.cmake
      DEPENDS ${out}/${name}.cu ${PROJECT_SOURCE_DIR}/cmake/compile_kernel.cmake
      DEPFILE ${out}/${name}.d
      COMMENT "Compiling CUDA kernel ${name}" VERBATIM)
    list(APPEND fatbins ${out}/${name}.fatbin)
    list(APPEND rows ${out}/${name}.csv)
    string(APPEND embedding "  .global ${name}_fatbin\n  .hidden ${name}_fatbin\n  .balign 64\n"
                            "${name}_fatbin:\n  .incbin \"${out}/${name}.fatbin\"\n")
  endforeach()
  file(CONFIGURE OUTPUT ${out}/embedded_kernels.S @ONLY
       CONTENT "  .section .nv_fatbin, \"a\"\n${embedding}  .section .note.GNU-stack, \"\", @progbits\n")
  add_custom_command(
    OUTPUT ${out}/kernels.csv
    COMMAND ${CMAKE_COMMAND} "-DROWS=${rows}" -DOUTPUT=${out}/kernels.csv
            -P ${PROJECT_SOURCE_DIR}/cmake/report_kernels.cmake
    DEPENDS ${rows} ${PROJECT_SOURCE_DIR}/cmake/report_kernels.cmake
    COMMENT "Summing up the CUDA kernels" VERBATIM)
  set_source_files_properties(${out}/embedded_kernels.S PROPERTIES OBJECT_DEPENDS "${fatbins};${out}/kernels.csv")

  file(GLOB host_sources CONFIGURE_DEPENDS ${src}/cuda_driver/*.cpp ${src}/sm80/*.cpp)
  target_sources(${target} PRIVATE ${host_sources} ${out}/embedded_kernels.S)
  target_compile_definitions(${target} PUBLIC FLASH_ATTN_HAVE_CUDA)
  target_include_directories(${target} SYSTEM PRIVATE ${FLASH_ATTN_CUDA_INCLUDE})
  target_link_libraries(${target} PUBLIC ${CMAKE_DL_LIBS})
endfunction()
