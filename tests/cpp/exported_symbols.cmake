# The shared library exports its C functions and nothing else.
execute_process(COMMAND ${NM} --dynamic --defined-only --format=posix ${LIBRARY}
                OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[^\n]+" symbols "${symbols}")
list(LENGTH symbols count)
list(FILTER symbols EXCLUDE REGEX "^flash_attn_[a-z_]+ T ")
if(symbols OR count EQUAL 0)
  message(FATAL_ERROR "${LIBRARY} exports ${count} symbols, among them: ${symbols}")
endif()
message(STATUS "${count} symbols exported, all of the C interface")
