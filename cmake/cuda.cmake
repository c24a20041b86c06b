# The CUDA kernels: generate_kernels.py writes a translation unit for each into the build folder, nvcc makes a fatbin of it
# (machine code, and PTX for newer devices), and one assembler file embeds them all. Nothing links against CUDA: the
# driver is found at run time.

# What stands in the way of building them, "" if nothing does. 12.8 is the first nvcc with --compress-mode.
set(cuda_lacks "")
if(NOT FLASH_ATTN_CUDA)
  set(cuda_lacks "FLASH_ATTN_CUDA is off")
elseif(NOT FLASH_ATTN_NVCC)
  set(cuda_lacks "nvcc not found")
elseif(NOT FLASH_ATTN_CUDA_VERSION VERSION_GREATER_EQUAL 12.8)
  set(cuda_lacks "${FLASH_ATTN_NVCC} is nvcc \"${FLASH_ATTN_CUDA_VERSION}\", older than 12.8")
elseif(NOT Python_FOUND)
  set(cuda_lacks "no Python found, which lists the kernels")
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

set(FLASH_ATTN_FATBINS "" CACHE PATH "Take the kernels from here, the folder cuda of another build that is up to date")
set(FLASH_ATTN_NVCC_FLAGS -std=c++20 -O3 -lineinfo)

# Compiles the kernels of generate_kernels.py and adds them, embedded, to `target`, with the host's side of their backends.
function(flash_attn_add_cuda_kernels target)
  set(csrc ${PROJECT_SOURCE_DIR}/csrc)
  set(out ${CMAKE_BINARY_DIR}/cuda)
  set(generator ${csrc}/generate_kernels.py)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${generator})
  execute_process(COMMAND ${Python_EXECUTABLE} ${generator} ${out} COMMAND_ERROR_IS_FATAL ANY)
  include(${out}/generated/kernels.cmake)
  foreach(name IN LISTS FLASH_ATTN_KERNELS)
    list(APPEND fatbins ${out}/${name}.fatbin)
    list(APPEND rows ${out}/${name}.csv)
    if(FLASH_ATTN_FATBINS)
      foreach(file ${name}.fatbin ${name}.csv)
        add_custom_command(
          OUTPUT ${out}/${file}
          COMMAND ${CMAKE_COMMAND} -E copy ${FLASH_ATTN_FATBINS}/${file} ${out}/${file}
          DEPENDS ${FLASH_ATTN_FATBINS}/${file} VERBATIM)
      endforeach()
      continue()
    endif()
    add_custom_command(
      OUTPUT ${out}/${name}.fatbin ${out}/${name}.csv
      COMMAND ${CMAKE_COMMAND} "-DNVCC=${FLASH_ATTN_NVCC}"
              "-DFLAGS=${FLASH_ATTN_NVCC_FLAGS}" ${FLASH_ATTN_FLAGS_OF_${name}} -DHOST=${CMAKE_CXX_COMPILER} -DWERROR=$<BOOL:${FLASH_ATTN_WERROR}> -DCSRC=${csrc} -DNAME=${name} -DOUT=${out}
              -P ${PROJECT_SOURCE_DIR}/cmake/compile_kernel.cmake
      DEPENDS ${out}/generated/${name}.cu ${PROJECT_SOURCE_DIR}/cmake/compile_kernel.cmake
      DEPFILE ${out}/${name}.d
      COMMENT "Compiling CUDA kernel ${name}" VERBATIM)
  endforeach()
  add_custom_command(
    OUTPUT ${out}/kernels.csv
    COMMAND ${CMAKE_COMMAND} "-DROWS=${rows}" -DOUTPUT=${out}/kernels.csv
            -P ${PROJECT_SOURCE_DIR}/cmake/report_kernels.cmake
    DEPENDS ${rows} ${PROJECT_SOURCE_DIR}/cmake/report_kernels.cmake
    COMMENT "Summing up the CUDA kernels" VERBATIM)
  set_source_files_properties(${out}/generated/embedded_kernels.S PROPERTIES OBJECT_DEPENDS "${fatbins};${out}/kernels.csv")

  file(GLOB host_sources CONFIGURE_DEPENDS ${csrc}/base/cuda_driver/*.cpp ${csrc}/flash_attn/src/hopper/*.cpp
                                           ${csrc}/flash_attn/src/sm80/*.cpp)
  foreach(operator IN LISTS FLASH_ATTN_OPERATORS)
    file(GLOB sources CONFIGURE_DEPENDS ${csrc}/${operator}/sm80/*.cpp)
    list(APPEND host_sources ${sources})
  endforeach()
  target_sources(${target} PRIVATE ${host_sources} ${out}/generated/embedded_kernels.S)
  target_compile_definitions(${target} PUBLIC FLASH_ATTN_HAVE_CUDA)
  target_include_directories(${target} PRIVATE ${out})
  target_include_directories(${target} SYSTEM PRIVATE ${FLASH_ATTN_CUDA_INCLUDE})
  target_link_libraries(${target} PUBLIC ${CMAKE_DL_LIBS})
endfunction()
