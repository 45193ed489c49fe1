# MBQ_CUDA: OFF builds the CPU backend alone. AUTO takes CUDA along where both a toolkit and CUDA sources are
# present; there are no CUDA sources yet, so it says so and builds the CPU backend.
if(MBQ_CUDA STREQUAL "AUTO")
  message(STATUS "MBQ_CUDA=AUTO: this version has no CUDA kernels; building the CPU backend")
elseif(NOT MBQ_CUDA STREQUAL "OFF")
  message(FATAL_ERROR "MBQ_CUDA: expected OFF or AUTO, got '${MBQ_CUDA}'")
endif()
