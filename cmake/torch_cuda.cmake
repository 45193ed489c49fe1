# Adds torch's CUDA half to mbq_torch: c10_cuda, torch_cuda and the headers of the CUDA runtime. Comes after torch.cmake
# and cuda_toolchain.cmake. The libraries that torch_cuda itself needs (cublas, cudnn ...) may be absent: a module links
# without them. scripts/check_link.py then shows that nothing of its own is undefined, which -Wl,--no-undefined cannot
# for a Python module, whose Py* symbols are the interpreter's.
file(STRINGS "${MBQ_TORCH_ROOT}/version.py" MBQ_TORCH_CUDA_VERSION REGEX "^cuda[:= ]")
string(REGEX MATCH "[0-9]+\\.[0-9]+" MBQ_TORCH_CUDA_VERSION "${MBQ_TORCH_CUDA_VERSION}")
if(NOT MBQ_TORCH_CUDA_VERSION)
  mbq_fail("torch ${Torch_VERSION} is built without CUDA: install a CUDA build of torch, or set MBQ_CUDA=OFF")
endif()
# Within a major version of CUDA the runtime is compatible, across them it has another soname.
string(REGEX MATCH "^[0-9]+" mbq_torch_major "${MBQ_TORCH_CUDA_VERSION}")
string(REGEX MATCH "^[0-9]+" mbq_nvcc_major "${CMAKE_CUDA_COMPILER_VERSION}")
if(NOT mbq_torch_major STREQUAL mbq_nvcc_major)
  mbq_fail("torch ${Torch_VERSION} is built with CUDA ${MBQ_TORCH_CUDA_VERSION}, nvcc is of CUDA ${CMAKE_CUDA_COMPILER_VERSION}: set CUDA_HOME to a toolkit of CUDA ${mbq_torch_major}")
endif()

target_include_directories(mbq_torch SYSTEM INTERFACE "${MBQ_CUDA_INCLUDE}")
foreach(library c10_cuda torch_cuda)
  find_library(MBQ_LIB_${library} ${library} PATHS "${MBQ_TORCH_ROOT}/lib" NO_DEFAULT_PATH REQUIRED)
  target_link_libraries(mbq_torch INTERFACE "${MBQ_LIB_${library}}")
endforeach()
target_link_libraries(mbq_torch INTERFACE "${MBQ_CUDART}")
