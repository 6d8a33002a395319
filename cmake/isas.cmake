# fovea_add_isas(PREFIX SOURCE OBJECTS ISA...): SOURCE compiled as the library PREFIX_ISA for each instruction set that this
# kind of processor may have; OBJECTS brings them along.
function(fovea_add_isas prefix source objects)
  set(flags_avx2 -mavx2 -mfma -mf16c -falign-loops=64)  # 5% of the backward hangs on where a product's loop lies
  set(flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512
    $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)  # g++ 12 warns inside its own avx512fintrin.h
  set(flags_avx512_bf16 ${flags_avx512} -mavx512bf16)
  set(flags_amx ${flags_avx512_bf16} -mamx-tile -mamx-bf16)
  foreach(isa IN LISTS ARGN)
    if(NOT isa STREQUAL "portable" AND NOT CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
      continue()
    endif()
    add_library(${prefix}_${isa} OBJECT ${PROJECT_SOURCE_DIR}/src/${source})
    target_include_directories(${prefix}_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
    target_compile_definitions(${prefix}_${isa} PRIVATE FOVEA_ISA=${isa})
    target_compile_options(${prefix}_${isa} PRIVATE
      -ffp-contract=fast -fno-math-errno -fno-trapping-math -fno-exceptions ${flags_${isa}})
    target_link_libraries(${prefix}_${isa} PRIVATE fovea_warnings)
    target_sources(${objects} INTERFACE $<TARGET_OBJECTS:${prefix}_${isa}>)
  endforeach()
endfunction()
