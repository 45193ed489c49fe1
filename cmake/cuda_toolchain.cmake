# Finds nvcc, its libraries and CUTLASS with scripts/cuda_toolchain.py and turns the CUDA language on. Sets
#   MBQ_CUDA_PROBLEM     empty, or in one line what is missing and what to do; nothing else is set then
#   MBQ_CUDA_INCLUDE     headers of the CUDA runtime, for C++ sources
#   MBQ_CUDART           the shared CUDA runtime: wheels have no libcudart.so that -lcudart would find
#   MBQ_CUTLASS_INCLUDE  headers of CUTLASS
# CMAKE_CUDA_COMPILER, the environment's CUDACXX and MBQ_CUTLASS_DIR are respected where they are set.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)

set(mbq_nvcc "")
if(CMAKE_CUDA_COMPILER)
  set(mbq_nvcc --nvcc "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  set(mbq_nvcc --nvcc "$ENV{CUDACXX}")
endif()
set(mbq_environment "")
if(MBQ_CUTLASS_DIR)
  set(mbq_environment "MBQ_CUTLASS_DIR=${MBQ_CUTLASS_DIR}")
endif()
execute_process(
  COMMAND "${CMAKE_COMMAND}" -E env ${mbq_environment}
          "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/../scripts/cuda_toolchain.py" --json ${mbq_nvcc}
  OUTPUT_VARIABLE mbq_toolchain ERROR_VARIABLE MBQ_CUDA_PROBLEM ERROR_STRIP_TRAILING_WHITESPACE)
string(REGEX REPLACE "^mambaquant_ext: " "" MBQ_CUDA_PROBLEM "${MBQ_CUDA_PROBLEM}")

if(NOT MBQ_CUDA_PROBLEM)
  string(JSON mbq_nvcc GET "${mbq_toolchain}" nvcc)
  string(JSON mbq_link_flags GET "${mbq_toolchain}" link_flags)
  string(JSON MBQ_CUDA_INCLUDE GET "${mbq_toolchain}" include)
  string(JSON MBQ_CUDART GET "${mbq_toolchain}" cudart)
  string(JSON MBQ_CUTLASS_INCLUDE GET "${mbq_toolchain}" cutlass)
  # A build folder stays with what it began with, whatever PATH and the environment say when it is configured again.
  set(CMAKE_CUDA_COMPILER "${mbq_nvcc}" CACHE FILEPATH "nvcc" FORCE)
  set(MBQ_CUTLASS_DIR "${MBQ_CUTLASS_INCLUDE}" CACHE PATH "Folder of CUTLASS, or of its headers" FORCE)
  # enable_language() links programs to try the compiler with.
  string(APPEND CMAKE_CUDA_FLAGS_INIT " ${mbq_link_flags}")
  enable_language(CUDA)
  # Targets name ${MBQ_CUDART} instead: shared, so that a process has one runtime, torch's or the simulator's.
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)
endif()
