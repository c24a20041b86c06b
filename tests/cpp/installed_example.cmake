# Installs the library, then builds examples/cpp against it with find_package, and checks what the programs print. The
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

function(expect example expected)
  execute_process(COMMAND ${WORK}/build/${example} OUTPUT_VARIABLE printed COMMAND_ERROR_IS_FATAL ANY)
  if(NOT printed STREQUAL expected)
    message(FATAL_ERROR "${example} printed\n${printed}instead of\n${expected}")
  endif()
endfunction()
expect(attention "token 0: out 0, lse 0
token 1: out 0.5, lse 0.693147
token 2: out 1, lse 1.09861
token 3: out 1.5, lse 1.38629
")
expect(paged_cache "prompts: sequence 0 has 20 tokens, out 9.5
prompts: sequence 1 has 20 tokens, out 9.5
decoding: sequence 0 has 21 tokens, out 10
decoding: sequence 1 has 8 tokens, out 3.5
decoding: sequence 0 has 22 tokens, out 10.5
decoding: sequence 1 has 9 tokens, out 4
")
