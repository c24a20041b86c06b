# How every build begins: the whole project's, and the emulated GPU's on its own.

option(FLASH_ATTN_WERROR "Treat compiler warnings as errors" OFF)
set(FLASH_ATTN_SANITIZE "" CACHE STRING "Sanitizers of every target, e.g. address,undefined")

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/lib)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)

include(GNUInstallDirs)
include(${CMAKE_CURRENT_LIST_DIR}/compile_options.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/isa_flags.cmake)
find_package(Threads REQUIRED)
include(${CMAKE_CURRENT_LIST_DIR}/nvcc.cmake)
