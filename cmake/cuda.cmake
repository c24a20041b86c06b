# The CUDA kernels: every line of src/<backend>/kernels.inc becomes a translation unit in the build folder, nvcc makes a
# fatbin of it (machine code for sm_80, PTX for newer devices), and one assembler file embeds them all. Nothing links
# against CUDA: the driver is found at run time.

set(FLASH_ATTN_CUDA AUTO CACHE STRING "Build the CUDA kernels: ON, OFF, or AUTO if nvcc is there")
set_property(CACHE FLASH_ATTN_CUDA PROPERTY STRINGS AUTO ON OFF)
find_program(FLASH_ATTN_NVCC nvcc PATHS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin)
mark_as_advanced(FLASH_ATTN_NVCC)

set(FLASH_ATTN_HAVE_CUDA FALSE)
if(NOT FLASH_ATTN_CUDA)
  message(STATUS "CUDA: FLASH_ATTN_CUDA is off: building the CPU backend only")
elseif(NOT FLASH_ATTN_NVCC)
  if(NOT FLASH_ATTN_CUDA STREQUAL AUTO)
    message(FATAL_ERROR "FLASH_ATTN_CUDA is on, but nvcc was not found: put it on PATH or set FLASH_ATTN_NVCC")
  endif()
  message(STATUS "CUDA: nvcc not found: building the CPU backend only")
else()
  execute_process(COMMAND ${FLASH_ATTN_NVCC} --version OUTPUT_VARIABLE nvcc_text)
  string(REGEX MATCH "release ([0-9]+\\.[0-9]+)" nvcc_text "${nvcc_text}")
  set(nvcc_version "${CMAKE_MATCH_1}")
  if(nvcc_version VERSION_GREATER_EQUAL 12.4)
    set(FLASH_ATTN_HAVE_CUDA TRUE)
    message(STATUS "CUDA: building the kernels with nvcc ${nvcc_version} (${FLASH_ATTN_NVCC})")
  elseif(NOT FLASH_ATTN_CUDA STREQUAL AUTO)
    message(FATAL_ERROR "the CUDA kernels need nvcc 12.4 or newer, ${FLASH_ATTN_NVCC} is ${nvcc_version}")
  else()
    message(STATUS "CUDA: nvcc ${nvcc_version} is older than 12.4: building the CPU backend only")
  endif()
endif()

if(FLASH_ATTN_HAVE_CUDA)
  enable_language(ASM)
  file(REAL_PATH ${FLASH_ATTN_NVCC} nvcc_file)
  cmake_path(GET nvcc_file PARENT_PATH nvcc_directory)
  find_path(FLASH_ATTN_CUDA_INCLUDE cuda.h HINTS ${nvcc_directory}/../include $ENV{CUDA_HOME}/include
            PATHS /usr/local/cuda/include REQUIRED)
  mark_as_advanced(FLASH_ATTN_CUDA_INCLUDE)
endif()

set(FLASH_ATTN_NVCC_FLAGS
    -fatbin -std=c++20 -O3 -lineinfo -gencode arch=compute_80,code=sm_80 -gencode arch=compute_80,code=compute_80
    -Xptxas -v,--warn-on-spills,--warn-on-local-memory-usage)

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
