# Finds Python, pybind11 and the torch that is installed, and makes mbq_torch: torch's headers and libraries
# without its global flags. Headers count as system headers, so that our warnings stay ours.
find_package(Python 3.10 COMPONENTS Interpreter Development.Module)
if(NOT Python_Interpreter_FOUND)
  mbq_fail("found no Python 3.10 or newer")
endif()
if(NOT Python_Development.Module_FOUND)
  mbq_fail("found no headers (Python.h) of ${Python_EXECUTABLE}: install them (Debian: apt install python3-dev)")
endif()

function(mbq_python_output variable code hint)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "${code}" OUTPUT_VARIABLE output
                  OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    mbq_fail("${hint}")
  endif()
  set(${variable} "${output}" PARENT_SCOPE)
endfunction()

set(MBQ_TORCH_DIR "" CACHE PATH "Folder that holds torch/, to build against without importing it; by default what Python imports")
if(MBQ_TORCH_DIR)
  set(MBQ_TORCH_ROOT "${MBQ_TORCH_DIR}/torch")
  if(NOT EXISTS "${MBQ_TORCH_ROOT}/version.py")
    mbq_fail("found no torch/version.py in MBQ_TORCH_DIR=${MBQ_TORCH_DIR}: pip install --no-deps --target there, or leave it empty")
  endif()
  file(STRINGS "${MBQ_TORCH_ROOT}/version.py" Torch_VERSION REGEX "^__version__ = ")
  string(REGEX REPLACE "^__version__ = '(.*)'$" "\\1" Torch_VERSION "${Torch_VERSION}")
else()
  mbq_python_output(MBQ_TORCH_PREFIX "import torch; print(torch.utils.cmake_prefix_path)"
    "found no torch to build against in ${Python_EXECUTABLE}: pip install 'torch>=2.10,<2.15', then pip install --no-build-isolation .")
  mbq_python_output(Torch_VERSION "import torch; print(torch.__version__)" "cannot read torch.__version__")
  get_filename_component(MBQ_TORCH_ROOT "${MBQ_TORCH_PREFIX}/../.." ABSOLUTE)
endif()
mbq_python_output(MBQ_PYBIND11_PREFIX "import pybind11; print(pybind11.get_cmake_dir())"
  "found no pybind11 to build with: pip install pybind11, then pip install --no-build-isolation .")
if(Torch_VERSION VERSION_LESS 2.10)
  mbq_fail("expected torch 2.10 or newer, got ${Torch_VERSION}: pip install 'torch>=2.10,<2.15'")
endif()

find_package(pybind11 REQUIRED CONFIG PATHS "${MBQ_PYBIND11_PREFIX}" NO_DEFAULT_PATH)

# The paths directly, not find_package(Torch): that one asks for a CUDA toolkit whenever torch was built with
# CUDA, and the CPU backend has no use for it.
add_library(mbq_torch INTERFACE)
target_include_directories(mbq_torch SYSTEM INTERFACE "${MBQ_TORCH_ROOT}/include"
                           "${MBQ_TORCH_ROOT}/include/torch/csrc/api/include")
foreach(library c10 torch_cpu)
  find_library(MBQ_LIB_${library} ${library} PATHS "${MBQ_TORCH_ROOT}/lib" NO_DEFAULT_PATH REQUIRED)
  target_link_libraries(mbq_torch INTERFACE "${MBQ_LIB_${library}}")
endforeach()
find_package(OpenMP)
if(OpenMP_CXX_FOUND)
  target_compile_options(mbq_torch INTERFACE ${OpenMP_CXX_FLAGS})
endif()
