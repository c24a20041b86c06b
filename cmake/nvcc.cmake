# Finds nvcc and cuda.h: of a CUDA toolkit, or of PyPI's packages in the Python environment of the build. Sets
# FLASH_ATTN_NVCC and FLASH_ATTN_CUDA_INCLUDE, and FLASH_ATTN_CUDA_VERSION to nvcc's (empty without it). Nothing is
# cached, for pip builds in an environment that is gone afterwards; what the user set stays.

set(FLASH_ATTN_CUDA AUTO CACHE STRING
    "Build the CUDA kernels: ON, OFF, AUTO if nvcc is there, or PYPI: with the nvcc of PyPI's packages and no other")
set_property(CACHE FLASH_ATTN_CUDA PROPERTY STRINGS AUTO ON OFF PYPI)
string(TOUPPER "${FLASH_ATTN_CUDA}" FLASH_ATTN_CUDA)
if(FLASH_ATTN_CUDA STREQUAL "")
  set(FLASH_ATTN_CUDA AUTO)
elseif(NOT FLASH_ATTN_CUDA MATCHES "^(AUTO|PYPI|ON|TRUE|YES|Y|1|OFF|FALSE|NO|N|0)$")
  message(FATAL_ERROR "FLASH_ATTN_CUDA is \"${FLASH_ATTN_CUDA}\": it must be one of AUTO, ON, OFF, PYPI")
endif()

# The folders nvidia/cu13 of the Python environment: `nvidia` is a namespace that several places may hold.
find_package(Python 3.9 COMPONENTS Interpreter QUIET)
set(pypi_cuda "")
if(Python_FOUND)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(*(f'{path}/cu13' for path in nvidia.__path__), sep=';')"
    OUTPUT_VARIABLE pypi_cuda OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
list(TRANSFORM pypi_cuda APPEND /bin OUTPUT_VARIABLE pypi_bin)
list(TRANSFORM pypi_cuda APPEND /include OUTPUT_VARIABLE pypi_include)

if(FLASH_ATTN_CUDA STREQUAL PYPI)
  unset(FLASH_ATTN_NVCC CACHE)
  unset(FLASH_ATTN_CUDA_INCLUDE CACHE)
  find_program(FLASH_ATTN_NVCC nvcc PATHS ${pypi_bin} NO_CACHE NO_DEFAULT_PATH)
else()
  find_program(FLASH_ATTN_NVCC nvcc PATHS $ENV{CUDA_HOME}/bin /usr/local/cuda/bin ${pypi_bin} NO_CACHE)
endif()

set(FLASH_ATTN_CUDA_VERSION "")
set(nvcc_include "")
if(FLASH_ATTN_NVCC)
  execute_process(COMMAND ${FLASH_ATTN_NVCC} --version OUTPUT_VARIABLE nvcc_text)
  if(nvcc_text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(FLASH_ATTN_CUDA_VERSION ${CMAKE_MATCH_1})
  endif()
  file(REAL_PATH ${FLASH_ATTN_NVCC} nvcc_include)
  cmake_path(REPLACE_FILENAME nvcc_include ../include)
endif()
find_path(FLASH_ATTN_CUDA_INCLUDE cuda.h HINTS ${nvcc_include} $ENV{CUDA_HOME}/include /usr/local/cuda/include
          PATHS ${pypi_include} NO_CACHE)
