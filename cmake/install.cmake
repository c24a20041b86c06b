# Two components: `cpp`, the C++ library with its headers and CMake package; `python`, the libraries beside the modules
# of the Python package (pyproject.toml installs this one alone).
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flash_attn)
install(TARGETS flash_attn EXPORT flash_attn_targets LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
list(TRANSFORM include_dirs APPEND / OUTPUT_VARIABLE headers)
install(DIRECTORY ${headers} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(EXPORT flash_attn_targets NAMESPACE flash_attn:: FILE flash_attnTargets.cmake DESTINATION ${package_dir}
        COMPONENT cpp)
configure_package_config_file(cmake/flash_attnConfig.cmake.in flash_attnConfig.cmake
                              INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(flash_attnConfigVersion.cmake COMPATIBILITY SameMajorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flash_attnConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/flash_attnConfigVersion.cmake
        DESTINATION ${package_dir} COMPONENT cpp)

if(TARGET gpu_emulator)
  install(TARGETS gpu_emulator LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp)
endif()

# A wheel cannot hold links: only libflash_attn.so.N, which libflash_attn_ffi.so finds beside itself.
if(TARGET flash_attn_ffi)
  install(TARGETS flash_attn LIBRARY DESTINATION flash_attn COMPONENT python NAMELINK_SKIP EXCLUDE_FROM_ALL)
  install(TARGETS flash_attn_ffi LIBRARY DESTINATION flash_attn COMPONENT python EXCLUDE_FROM_ALL)
  install(FILES flash_attn_2_cuda.py DESTINATION . COMPONENT python EXCLUDE_FROM_ALL)
endif()

# Loaded by name in place of the CUDA driver: beside the package's modules, without a version in its name.
if(TARGET gpu_emulator)
  install(PROGRAMS $<TARGET_FILE:gpu_emulator> DESTINATION flash_attn RENAME libgpu_emulator.so COMPONENT python
          EXCLUDE_FROM_ALL)
endif()
