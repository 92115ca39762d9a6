# Fails if an object of one instruction set defines a symbol that the linker may merge with
# an equal one of another: a machine without AVX-512 could then be handed the AVX-512 copy,
# and stop with an illegal instruction. Everything must live in bmtard::${TARGET}.
string(LENGTH "${TARGET}" length)
execute_process(COMMAND "${NM}" --defined-only ${OBJECTS} OUTPUT_VARIABLE symbols
                COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL " [WVuS] [^\n]+" mergeable "${symbols}")
list(FILTER mergeable EXCLUDE REGEX "6bmtard${length}${TARGET}")
list(FILTER mergeable EXCLUDE REGEX "DW\\.ref\\.__gxx_personality_v0")
if(mergeable)
  list(JOIN mergeable "\n  " mergeable)
  message(FATAL_ERROR "csrc/cpu, built for ${TARGET}, defines symbols outside bmtard::${TARGET}, "
                      "which the linker may share between instruction sets:\n  ${mergeable}")
endif()
