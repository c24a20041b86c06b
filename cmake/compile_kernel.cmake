# One CUDA kernel: NAME.cu in OUT to NAME.fatbin, and what ptxas tells of it to NAME.csv and the terminal.
string(TIMESTAMP start "%s")

if(WERROR)
  list(APPEND FLAGS -Werror all-warnings)
endif()
execute_process(
  COMMAND ${NVCC} ${FLAGS} -ccbin ${HOST} -I${CSRC} -I${CSRC}/base/include -I${CSRC}/flash_attn/include
          -I${CSRC}/flash_attn/src -MD -MF ${OUT}/${NAME}.d -MT ${OUT}/${NAME}.fatbin
          -o ${OUT}/${NAME}.fatbin ${OUT}/generated/${NAME}.cu
  RESULT_VARIABLE result OUTPUT_VARIABLE text ERROR_VARIABLE text)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "nvcc failed for ${NAME}:\n${text}")
endif()
string(TIMESTAMP end "%s")
math(EXPR seconds "${end} - ${start}")
foreach(item "registers:Used ([0-9]+) registers" "stack:([0-9]+) bytes stack frame"
             "spill_stores:([0-9]+) bytes spill stores" "spill_loads:([0-9]+) bytes spill loads")
  string(REGEX MATCH "^([a-z_]+):(.*)$" item ${item})
  set(variable ${CMAKE_MATCH_1})
  if(NOT text MATCHES "${CMAKE_MATCH_2}")
    message(FATAL_ERROR "ptxas does not tell the ${variable} of ${NAME}:\n${text}")
  endif()
  set(${variable} ${CMAKE_MATCH_1})
endforeach()
file(SIZE ${OUT}/${NAME}.fatbin bytes)
file(WRITE ${OUT}/${NAME}.csv "${NAME},${registers},${stack},${spill_stores},${spill_loads},${bytes},${seconds}\n")
