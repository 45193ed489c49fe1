# Ends the configuration with one line that says what to do. CMake does not wrap a line that is indented.
function(mbq_fail hint)
  message(FATAL_ERROR "\n  mambaquant_ext: ${hint}\n")
endfunction()

# project() would ask for a compiler in CMake's words, which do not say where to get one.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  mbq_fail("found no C++ compiler: install one (Debian: apt install g++), or name it in the variable CXX")
endif()
enable_language(CXX)
