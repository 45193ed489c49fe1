# Compiles the same sources once per instruction set. MBQ_ISA names the namespace that the code lands in;
# csrc/cpu/isa.cc picks a table when the library is loaded.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  set(MBQ_ISAS scalar avx2 avx512_vnni)
else()
  set(MBQ_ISAS scalar)
endif()
set(MBQ_ISA_FLAGS_scalar "")
set(MBQ_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(MBQ_ISA_FLAGS_avx512_vnni
    -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512
    -Wno-uninitialized -Wno-maybe-uninitialized)  # GCC 12 warns inside its own avx512fintrin.h (GCC bug 105593)

# With these two GCC moves the accumulators of the matrix product about in every turn of its inner loop, or
# keeps them in memory: a tile takes up to half as long again.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set_source_files_properties(csrc/cpu/gemm.cc PROPERTIES COMPILE_OPTIONS "-fno-tree-coalesce-vars;-fno-tree-ter")
endif()

function(mbq_add_isa_objects target)
  cmake_parse_arguments(ARG "" "" "SOURCES" ${ARGN})
  foreach(isa IN LISTS MBQ_ISAS)
    add_library(mambaquant_${isa} OBJECT ${ARG_SOURCES})
    target_include_directories(mambaquant_${isa} PRIVATE csrc csrc/include)
    target_compile_definitions(mambaquant_${isa} PRIVATE MBQ_ISA=${isa})
    target_compile_options(mambaquant_${isa} PRIVATE ${MBQ_ISA_FLAGS_${isa}} -fno-exceptions -fno-rtti)
    mbq_set_compile_flags(mambaquant_${isa})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:mambaquant_${isa}>)
  endforeach()
  if("avx2" IN_LIST MBQ_ISAS)
    target_compile_definitions(${target} PRIVATE MBQ_BUILD_X86)
  endif()
endfunction()
