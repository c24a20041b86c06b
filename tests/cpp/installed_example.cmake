# Installs the library, then builds examples/cpp against it with find_package, and checks what the program prints. The
# emulated GPU, if EMULATOR, is beside the library.
file(REMOVE_RECURSE ${WORK})
set(ENV{DESTDIR})

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

run(${CMAKE_COMMAND} --install ${BUILD} --component cpp --prefix ${WORK}/prefix)
file(GLOB_RECURSE library ${WORK}/prefix/libflash_attn.so)
cmake_path(REPLACE_FILENAME library libgpu_emulator.so OUTPUT_VARIABLE emulator)
if(EMULATOR AND NOT EXISTS ${emulator})
  message(FATAL_ERROR "${emulator} is missing")
endif()
run(${CMAKE_COMMAND} -S ${EXAMPLE} -B ${WORK}/build -G ${GENERATOR} -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM}
    -DCMAKE_CXX_COMPILER=${CXX} -DCMAKE_PREFIX_PATH=${WORK}/prefix)
run(${CMAKE_COMMAND} --build ${WORK}/build)

execute_process(COMMAND ${WORK}/build/attention OUTPUT_VARIABLE printed COMMAND_ERROR_IS_FATAL ANY)
set(expected "token 0: out 0, lse 0
token 1: out 0.5, lse 0.693147
token 2: out 1, lse 1.09861
token 3: out 1.5, lse 1.38629
")
if(NOT printed STREQUAL expected)
  message(FATAL_ERROR "The example printed\n${printed}instead of\n${expected}")
endif()
