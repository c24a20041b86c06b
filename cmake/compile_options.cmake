# Options common to all targets.

if(FLASH_ATTN_SANITIZE)
  # -g1: lines for the reports; full debugging information doubles the time of the build.
  set(sanitize_options -fsanitize=${FLASH_ATTN_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1)
  add_compile_options(${sanitize_options})
  add_link_options(${sanitize_options})
endif()

# The kernels call std::fma where they want one: -ffp-contract=off keeps results equal across instruction sets.
function(flash_attn_compile_options target)
  target_compile_options(${target} PRIVATE -fno-math-errno -ffp-contract=off -Wall -Wextra
                                           $<$<BOOL:${FLASH_ATTN_WERROR}>:-Werror>)
  set_target_properties(${target} PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON
                                             INTERPROCEDURAL_OPTIMIZATION OFF)
endfunction()

# Links `target` with nothing undefined. It exports the symbols that match `pattern` and no others: templates of the standard library, compiled for one
# instruction set, must not be found by other libraries of the process.
function(flash_attn_export_only target pattern)
  set(script ${CMAKE_BINARY_DIR}/${target}.version)
  file(CONFIGURE OUTPUT ${script} CONTENT "{ global: ${pattern}; local: *; };\n")
  target_link_options(${target} PRIVATE LINKER:--version-script=${script} LINKER:-z,defs)
  set_property(TARGET ${target} APPEND PROPERTY LINK_DEPENDS ${script})
endfunction()
