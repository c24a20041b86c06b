# Flags of the files compiled once per instruction set. The kernels' arithmetic is IEEE: no
# contraction of a * b + c, or results would depend on the instruction set.
set(exec_dir ${CMAKE_CURRENT_LIST_DIR})
set(exec_flags -ffp-contract=off -fno-strict-aliasing -fno-math-errno -fno-trapping-math)
file(GLOB exec_sources CONFIGURE_DEPENDS ${exec_dir}/*.cpp)
set_property(SOURCE ${exec_sources} APPEND PROPERTY COMPILE_OPTIONS ${exec_flags})
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set_property(SOURCE ${exec_dir}/isa_avx2.cpp APPEND PROPERTY COMPILE_OPTIONS -mavx2 -mfma -mf16c
                                                                               -mbmi2)
  set_property(
    SOURCE ${exec_dir}/isa_avx512.cpp
    APPEND
    PROPERTY COMPILE_OPTIONS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mbmi2
             -mprefer-vector-width=512)
endif()
