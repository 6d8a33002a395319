# What `cmake --install` lays down: headers, library, command, and how find_package and pkg-config find them.  All but the
# command is the component "library".
include(CMakePackageConfigHelpers)
set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME library)

install(TARGETS fovea EXPORT fovea_targets)
if(TARGET fovea_nn)
  install(TARGETS fovea_nn EXPORT fovea_targets)
  set(fovea_has_nn TRUE)
else()
  set(fovea_has_nn FALSE)
  set(fovea_headers_left_out PATTERN nn EXCLUDE)
endif()
install(TARGETS fovea_command COMPONENT command)
# `./dev pack` makes it; the library and the command each look beside themselves.
install(FILES ${PROJECT_BINARY_DIR}/fovea.pack DESTINATION ${CMAKE_INSTALL_LIBDIR} OPTIONAL)
install(FILES ${PROJECT_BINARY_DIR}/fovea.pack DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT command OPTIONAL)
install(DIRECTORY include/fovea DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h"
  ${fovea_headers_left_out}
)

get_target_property(fovea_type fovea TYPE)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fovea)
install(EXPORT fovea_targets NAMESPACE fovea:: FILE foveaTargets.cmake DESTINATION ${package_dir})
configure_package_config_file(cmake/foveaConfig.cmake.in foveaConfig.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(foveaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/foveaConfig.cmake ${PROJECT_BINARY_DIR}/foveaConfigVersion.cmake
  DESTINATION ${package_dir}
)

function(fovea_install_pc name description requires libs)
  file(RELATIVE_PATH prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
  foreach(folder LIBDIR INCLUDEDIR)  # relative to the prefix, or absolute, as Nix gives them
    set(${folder} "\${prefix}")
    cmake_path(APPEND ${folder} ${CMAKE_INSTALL_${folder}})
  endforeach()
  configure_file(cmake/pkgconfig.pc.in ${name}.pc @ONLY)
  install(FILES ${PROJECT_BINARY_DIR}/${name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endfunction()

# A shared library finds what it uses by itself; whoever links the static one must name it.
if(fovea_type STREQUAL "STATIC_LIBRARY")
  set(fovea_uses tbb)
  set(fovea_links " -lstdc++ -lm -ldl")
  set(fovea_nn_uses " fmt")
  set(fovea_nn_links " -ldnnl")
endif()
fovea_install_pc(fovea "${PROJECT_DESCRIPTION}" "${fovea_uses}" "-lfovea${fovea_links}")
if(TARGET fovea_nn)
  fovea_install_pc(fovea-nn "Layers on Fovea's attention" "fovea${fovea_nn_uses}" "-lfovea_nn${fovea_nn_links}")
endif()
