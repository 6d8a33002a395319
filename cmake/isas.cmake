# fovea_add_isas(PREFIX SOURCE OBJECTS): the library PREFIX_ISA for each instruction set; OBJECTS brings them along.
function(fovea_add_isas prefix source objects)
  set(isas portable)
  set(flags_portable "")
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
    list(APPEND isas avx2 avx512)
    set(flags_avx2 -mavx2 -mfma -mf16c)
    set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512
      $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)  # g++ 12 warns inside its own avx512fintrin.h
  endif()
  foreach(isa IN LISTS isas)
    add_library(${prefix}_${isa} OBJECT ${PROJECT_SOURCE_DIR}/src/${source})
    target_include_directories(${prefix}_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
    target_compile_definitions(${prefix}_${isa} PRIVATE FOVEA_ISA=${isa})
    target_compile_options(${prefix}_${isa} PRIVATE
      -ffp-contract=fast -fno-math-errno -fno-trapping-math ${flags_${isa}})
    target_link_libraries(${prefix}_${isa} PRIVATE fovea_warnings)
    target_sources(${objects} INTERFACE $<TARGET_OBJECTS:${prefix}_${isa}>)
  endforeach()
endfunction()
