# Flags that every target gets, once. Warnings stop a build where CMAKE_COMPILE_WARNING_AS_ERROR says so: in the presets
# and checks of this repository, not in a user's build, whose compiler may warn of more than ours.
function(mbq_set_compile_flags target)
  # -ffp-contract=off: a*b + c rounds twice unless a kernel writes fma, so that bit equality between the
  # integer path and its emulation is defined by the source.
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wconversion -ffp-contract=off)
  if(MBQ_SANITIZE)
    # -O0: the checks make the inlined vector code so long that optimising it takes a minute a file.
    target_compile_options(${target} PRIVATE -fsanitize=${MBQ_SANITIZE} -fno-sanitize-recover=all -g -O0)
    target_link_options(${target} PUBLIC -fsanitize=${MBQ_SANITIZE})
  endif()
endfunction()
