# The rings around the unit tests: problem lists and random problems against the oracle, scripts that drive the command,
# faults, the installed tree.  Labels: unit, ring, long, faults, tree (ctest -L).  77 means: skipped, the machine lacks a
# tool.
set(FOVEA_RANDOM_CHECKS 400 CACHE STRING "Random problems that the tests compare with the oracle")
set(FOVEA_SANITIZER "" CACHE STRING "What CMAKE_CXX_FLAGS sanitize: address, thread or nothing (CMakePresets.json)")
find_package(Python3 3.11 REQUIRED COMPONENTS Interpreter)

if(FOVEA_SANITIZER)
  set(timeout 1800)  # they make everything ten times as slow
else()
  set(timeout 900)
endif()
function(fovea_add_ring name labels)
  add_test(NAME ${name} COMMAND ${ARGN})
  set_tests_properties(${name} PROPERTIES LABELS "${labels}" TIMEOUT ${timeout} SKIP_RETURN_CODE 77)
endfunction()

# Tests of one thread begin in the order of their COST, the seconds that they take; two processors are seldom free at once
# before those end, so what takes all threads comes last, and no thread is without work.
function(fovea_takes_threads name)
  set_tests_properties(${name} PROPERTIES PROCESSORS 2)
endfunction()

# Every list of problems, and random ones, against the double reference.
file(GLOB problem_lists CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/problems/*.txt)
foreach(list IN LISTS problem_lists)
  cmake_path(GET list STEM stem)
  if(FOVEA_SANITIZER AND stem MATCHES "^(masks|many_heads)$")
    continue()  # large for GPUs, and to a CPU nothing that the other lists don't have
  endif()
  set(labels ring)
  if(NOT stem MATCHES "^(smoke|traps|composition)$")
    list(APPEND labels long)  # shapes that matter to GPUs' tiles: left out by `./dev sanitize --short`
  endif()
  fovea_add_ring(check_${stem} "${labels}" fovea_command check @${list})
  fovea_takes_threads(check_${stem})
endforeach()
fovea_add_ring(check_random ring fovea_command check --random ${FOVEA_RANDOM_CHECKS} --seed 1)
fovea_takes_threads(check_random)

# GPU kernels of the lists, some of every kind, compiled with no GPU: no spills, no warnings, in time.  Blackwell's, which
# still spill here and there, are left to `./dev compile-ring`.
if(NOT FOVEA_SANITIZER)
  fovea_add_ring(kernels ring bash ${CMAKE_CURRENT_SOURCE_DIR}/compile_ring.sh $<TARGET_FILE:fovea_command>
    ${CMAKE_CURRENT_BINARY_DIR}/kernels.txt sm_75,sm_80,sm_90 --most 107 --median-seconds 2 --most-seconds 4
  )
  fovea_add_ring(ladder_kernels ring bash ${CMAKE_CURRENT_SOURCE_DIR}/ladder_kernels.sh $<TARGET_FILE:fovea_command>)
  set_tests_properties(kernels ladder_kernels PROPERTIES RUN_SERIAL TRUE COST 1000  # nothing has to end before they begin
    ENVIRONMENT FOVEA_CACHE_DIR=${CMAKE_BINARY_DIR}/kernels
  )
endif()

# A failed allocation anywhere: its own executable, because it replaces operator new, which TSan keeps for itself.
if(NOT FOVEA_SANITIZER STREQUAL "thread")
  add_executable(fovea_allocation_faults faults/allocation_faults.cpp)
  target_include_directories(fovea_allocation_faults PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(fovea_allocation_faults PRIVATE fovea_tools fovea_internal fovea_warnings GTest::gtest_main)
  if(TARGET fovea_nn_internal)
    target_compile_definitions(fovea_allocation_faults PRIVATE FOVEA_LAYERS)
    target_link_libraries(fovea_allocation_faults PRIVATE fovea_nn_internal)
  endif()
  gtest_discover_tests(fovea_allocation_faults DISCOVERY_TIMEOUT 60 PROPERTIES LABELS faults TIMEOUT 300)
endif()

# What the library does with a driver, and when the driver fails: a fake one takes libcuda's name.
add_library(fovea_fake_driver SHARED faults/fake_driver.cpp)
set_target_properties(fovea_fake_driver PROPERTIES
  OUTPUT_NAME cuda SOVERSION 1 LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/fake_driver
)
add_library(fovea_failing_nvrtc SHARED faults/failing_nvrtc.cpp)
add_executable(fovea_driver_faults faults/device_call_faults.cpp faults/driver_faults.cpp)
target_include_directories(fovea_driver_faults PRIVATE ${PROJECT_SOURCE_DIR})
target_link_libraries(fovea_driver_faults PRIVATE fovea_tools fovea_internal fovea_warnings GTest::gtest_main)
target_compile_definitions(fovea_driver_faults PRIVATE FOVEA_FAILING_NVRTC="$<TARGET_FILE:fovea_failing_nvrtc>")
add_dependencies(fovea_driver_faults fovea_fake_driver fovea_failing_nvrtc)
gtest_discover_tests(fovea_driver_faults DISCOVERY_TIMEOUT 60 PROPERTIES LABELS faults TIMEOUT 60
  ENVIRONMENT LD_LIBRARY_PATH=${CMAKE_CURRENT_BINARY_DIR}/fake_driver
)

# The command from outside, and its pages in a browser.
foreach(script command picture)
  fovea_add_ring(${script} tree Python3::Interpreter ${CMAKE_CURRENT_SOURCE_DIR}/${script}_test.py
    $<TARGET_FILE:fovea_command>
  )
endforeach()

# What developers type, where packages are missing.
fovea_add_ring(dev tree bash ${CMAKE_CURRENT_SOURCE_DIR}/dev_test.sh ${PROJECT_SOURCE_DIR})

# The documents point at things that exist.
fovea_add_ring(docs tree Python3::Interpreter ${CMAKE_CURRENT_SOURCE_DIR}/docs_test.py)

# Rooms include what docs/architecture.md says, and nothing else.
fovea_add_ring(includes tree Python3::Interpreter ${CMAKE_CURRENT_SOURCE_DIR}/includes_test.py)

# The barriers of Hopper's backward, in every order.
fovea_add_ring(backward_barriers tree Python3::Interpreter ${CMAKE_CURRENT_SOURCE_DIR}/backward_barriers_test.py)
set_tests_properties(backward_barriers PROPERTIES COST 20)

# The installed tree serves find_package and pkg-config, static and shared.
fovea_add_ring(install tree bash ${CMAKE_CURRENT_SOURCE_DIR}/install_test.sh ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR})
set_tests_properties(install PROPERTIES COST 20)

# No object compiled for one instruction set may lend code to the others; without optimisation nothing is inlined, so
# only an optimised build can tell.
if(CMAKE_BUILD_TYPE STREQUAL "Release")
  foreach(isa IN ITEMS portable avx2 avx512 avx512_bf16 amx)
    if(TARGET fovea_flash_${isa})
      fovea_add_ring(isa_objects_${isa} tree
        bash ${CMAKE_CURRENT_SOURCE_DIR}/isa_objects_test.sh ${isa} $<TARGET_OBJECTS:fovea_flash_${isa}>
      )
    endif()
  endforeach()
endif()

if(FOVEA_SANITIZER STREQUAL "address")
  add_subdirectory(fuzz)
elseif(FOVEA_SANITIZER STREQUAL "thread")
  # tests/tsan_threads.cpp says why.
  set_source_files_properties(${PROJECT_SOURCE_DIR}/src/cpu/threads.cpp TARGET_DIRECTORY fovea_objects PROPERTIES
    COMPILE_OPTIONS -fno-sanitize=thread COMPILE_DEFINITIONS run_tasks=run_tasks_unseen
  )
  target_sources(fovea_objects PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/tsan_threads.cpp)
  target_compile_definitions(fovea_tests PRIVATE FOVEA_TSAN)
endif()

# The Python package, which `./dev test` builds and installs into an environment of its own beforehand: its tests, the
# tutorial, a real model and a small one in training.
if(NOT FOVEA_SANITIZER)
  add_library(fovea_judge SHARED python/judge.cpp)
  target_link_libraries(fovea_judge PRIVATE fovea_tools fovea_internal fovea_warnings)
  function(fovea_add_python name)
    fovea_add_ring(python_${name} tree bash ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/python/run.sh ${PROJECT_SOURCE_DIR}/build/venv ${ARGN})
    set_tests_properties(python_${name} PROPERTIES WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}
      ENVIRONMENT "FOVEA_JUDGE=$<TARGET_FILE:fovea_judge>;OMP_NUM_THREADS=1;TORCHINDUCTOR_COMPILE_THREADS=1"
    )
  endfunction()
  foreach(part arrays torch refusals sdpa flash_attn jax nn minitest random_problems package time)
    fovea_add_python(${part} -m pytest -q -c ${PROJECT_SOURCE_DIR}/pyproject.toml ${CMAKE_CURRENT_SOURCE_DIR}/python/test_${part}.py)
  endforeach()
  if(TARGET fovea_nn_internal)  # the contestant in C++
    set_property(TEST python_minitest APPEND PROPERTY ENVIRONMENT FOVEA_MINITEST=${PROJECT_BINARY_DIR}/tests/fovea_minitest)
  endif()
  # What measures time wants the machine for itself.
  set_tests_properties(python_time PROPERTIES RUN_SERIAL TRUE COST 1000)
  foreach(part_and_cost random_problems:75 package:70 refusals:55 torch:50 nn:25 minitest:25 jax:15 sdpa:10)
    string(REGEX MATCH "(.*):(.*)" unused ${part_and_cost})
    set_tests_properties(python_${CMAKE_MATCH_1} PROPERTIES COST ${CMAKE_MATCH_2})
  endforeach()
  fovea_add_python(tutorial ${PROJECT_SOURCE_DIR}/examples/python/five_cliffs.py)
  fovea_add_python(minilm ${PROJECT_SOURCE_DIR}/examples/python/minilm.py)
  fovea_add_python(train_long ${PROJECT_SOURCE_DIR}/examples/python/train_long.py --lengths 512 --width 32 --heads 2 --steps 1)
  fovea_add_python(gpt ${PROJECT_SOURCE_DIR}/examples/python/train_gpt.py --steps 40 --seqlen 96 --dim 64)
endif()
