# Finds apache-tvm-ffi (tvm_ffi::shared), a Python package that carries a C++ library. Without it only the plain C++
# library is built, unless the build is one of the Python package.

find_package(Python 3.9 COMPONENTS Interpreter)
if(Python_FOUND)
  execute_process(COMMAND ${Python_EXECUTABLE} -m tvm_ffi.config --cmakedir
                  OUTPUT_VARIABLE tvm_ffi_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(tvm_ffi_DIR ${tvm_ffi_ROOT})
  find_package(tvm_ffi CONFIG QUIET)
endif()
if(NOT TARGET tvm_ffi::shared)
  set(message "apache-tvm-ffi not found for ${Python_EXECUTABLE}: libflash_attn_ffi is not built")
  if(SKBUILD)
    message(FATAL_ERROR ${message})
  endif()
  message(STATUS ${message})
endif()
