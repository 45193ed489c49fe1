# The CUDA backend, by MBQ_CUDA:
#   OFF      CPU backend alone
#   KERNELS  also csrc/cuda as machine code for every architecture, linked into nothing: a check that needs
#            neither a GPU nor torch
#   SIM      the extension with csrc/cuda as PTX, run by the simulator of third_party/cudasim: CPU tensors in,
#            CUDA launchers called
#   ON       the extension with csrc/cuda as machine code, against a torch that was built with CUDA
#   AUTO     ON where torch was built with CUDA, else OFF
# Architectures of KERNELS and ON: MBQ_CUDA_ARCHITECTURES; by default those of torch's own variable
# TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX") where it is set, else all that are tested.
set(MBQ_CUDA_MODES OFF KERNELS SIM ON AUTO)
if(NOT MBQ_CUDA IN_LIST MBQ_CUDA_MODES)
  mbq_fail("MBQ_CUDA: expected one of OFF, KERNELS, SIM, ON and AUTO, got '${MBQ_CUDA}'")
endif()

set(mbq_architectures 80-real 86-real 89-real 90a-real 100-real 120)
if(DEFINED ENV{TORCH_CUDA_ARCH_LIST})
  set(mbq_architectures "")
  string(REGEX MATCHALL "[0-9.]+[af]?(\\+PTX)?" named "$ENV{TORCH_CUDA_ARCH_LIST}")
  foreach(name IN LISTS named)
    string(REPLACE "." "" name "${name}")
    if(name MATCHES "PTX")
      string(REPLACE "+PTX" "" name "${name}")
    else()
      string(APPEND name "-real")
    endif()
    list(APPEND mbq_architectures "${name}")
  endforeach()
endif()
set(MBQ_CUDA_ARCHITECTURES "${mbq_architectures}"
    CACHE STRING "What csrc/cuda is compiled for, as CMake's CUDA_ARCHITECTURES")
set(MBQ_CUDA_LIBRARY "" CACHE FILEPATH "libmambaquant_cuda.a of a KERNELS build, in place of compiling it again")
set(MBQ_CUDA_SOURCES
    csrc/cuda/quantize.cu
    csrc/cuda/norm.cu
    csrc/cuda/hadamard.cu
    csrc/cuda/conv1d.cu
    csrc/cuda/conv2d.cu
    csrc/cuda/gemm.cu
    csrc/cuda/gemm_plan.cu
    csrc/cuda/gemm_tiles_large.cu
    csrc/cuda/gemm_tiles_small.cu
    csrc/cuda/selective_scan.cu)
# Kernels of Hopper's own instructions: left out where MBQ_CUDA_ARCHITECTURES has no 90a.
set(MBQ_CUDA_SM90_SOURCES csrc/cuda/gemm_sm90.cu)

function(mbq_add_cuda_objects target architectures)
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} PRIVATE csrc csrc/include)
  target_include_directories(${target} SYSTEM PRIVATE "${MBQ_CUTLASS_INCLUDE}")
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${architectures}")
  # Keeps ptxas's report of registers and spills beside each object (scripts/ptxas_report.py).
  set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER
                        "${Python_EXECUTABLE};${PROJECT_SOURCE_DIR}/scripts/nvcc_with_report.py")
  # -std here, since CMake below 3.26 knows no C++20 for nvcc.
  target_compile_options(${target} PRIVATE -std=c++20 -Xcompiler=-Wall,-Wextra
                         --expt-relaxed-constexpr -lineinfo)
endfunction()

# mambaquant_cuda: the kernels as PTX for the simulator, or as machine code.
function(mbq_add_cuda_kernels)
  if(MBQ_CUDA STREQUAL "SIM")
    set(architectures 80-virtual)
    set(sm90_architectures 90a-virtual)
  else()
    set(architectures ${MBQ_CUDA_ARCHITECTURES})
    set(sm90_architectures ${MBQ_CUDA_ARCHITECTURES})
    list(FILTER sm90_architectures INCLUDE REGEX "^90a")
  endif()
  mbq_add_cuda_objects(mambaquant_cuda_objects "${architectures}" ${MBQ_CUDA_SOURCES})
  add_library(mambaquant_cuda STATIC $<TARGET_OBJECTS:mambaquant_cuda_objects>)
  if(sm90_architectures)
    mbq_add_cuda_objects(mambaquant_cuda_sm90_objects "${sm90_architectures}" ${MBQ_CUDA_SM90_SOURCES})
    # Whatever the build type: an assertion in CUTLASS's main loop is a call, across which wgmma does not overlap.
    target_compile_definitions(mambaquant_cuda_sm90_objects PRIVATE NDEBUG)
    target_sources(mambaquant_cuda PRIVATE $<TARGET_OBJECTS:mambaquant_cuda_sm90_objects>)
  else()
    target_compile_definitions(mambaquant_cuda_objects PRIVATE MBQ_WITHOUT_SM90A)
  endif()
  set_target_properties(mambaquant_cuda PROPERTIES LINKER_LANGUAGE CXX)
endfunction()

# What the extension module takes along of the CUDA backend.
function(mbq_link_cuda module)
  if(MBQ_CUDA STREQUAL "SIM")
    target_sources(${module} PRIVATE csrc/torch/backend_simulator.cpp csrc/torch/gemm_control.cpp)
    target_link_libraries(${module} PRIVATE mambaquant_cuda cudasim)
    target_include_directories(${module} SYSTEM PRIVATE "${MBQ_CUDA_INCLUDE}")
    target_compile_definitions(${module} PRIVATE MBQ_WITH_SIMULATOR)
    # The simulator, a libcudart.so.13, is found in the folder of the module.
    set_target_properties(${module} PROPERTIES INSTALL_RPATH "$ORIGIN" BUILD_WITH_INSTALL_RPATH ON)
    install(TARGETS cudasim LIBRARY DESTINATION mambaquant_ext)
  elseif(MBQ_CUDA STREQUAL "ON")
    target_sources(${module} PRIVATE csrc/torch/backend_cuda.cpp csrc/torch/gemm_control.cpp)
    target_link_libraries(${module} PRIVATE mambaquant_cuda)
    target_compile_definitions(${module} PRIVATE MBQ_WITH_CUDA)
  endif()
endfunction()

if(MBQ_CUDA STREQUAL "AUTO")
  set(MBQ_CUDA OFF)
  if(MBQ_BUILD_PYTHON AND EXISTS "${MBQ_TORCH_ROOT}/lib/libc10_cuda.so")
    set(MBQ_CUDA ON)
  endif()
  message(STATUS "MBQ_CUDA=AUTO: ${MBQ_CUDA}")
endif()
if(NOT MBQ_CUDA STREQUAL "OFF")
  include(cuda_toolchain)
  if(MBQ_CUDA_PROBLEM)
    mbq_fail("MBQ_CUDA=${MBQ_CUDA}: ${MBQ_CUDA_PROBLEM}; for the CPU backend alone, set MBQ_CUDA=OFF")
  endif()
  if(MBQ_CUDA STREQUAL "ON")
    include(torch_cuda)
  endif()
  if(MBQ_CUDA_LIBRARY)
    add_library(mambaquant_cuda STATIC IMPORTED)
    set_target_properties(mambaquant_cuda PROPERTIES IMPORTED_LOCATION "${MBQ_CUDA_LIBRARY}")
  else()
    mbq_add_cuda_kernels()
  endif()
  if(MBQ_CUDA STREQUAL "SIM")
    add_subdirectory(third_party/cudasim)
  endif()
endif()
