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

# A shared library finds what it uses by itself; whoever links the static one must name it.
get_target_property(fovea_type fovea TYPE)
if(fovea_type STREQUAL "STATIC_LIBRARY")
  set(fovea_pc_requires "tbb")
  set(fovea_pc_libs "-lstdc++ -lm -ldl")
endif()

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/fovea)
install(EXPORT fovea_targets NAMESPACE fovea:: FILE foveaTargets.cmake DESTINATION ${package_dir})
configure_package_config_file(cmake/foveaConfig.cmake.in foveaConfig.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may change the interface.
write_basic_package_version_file(foveaConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/foveaConfig.cmake ${PROJECT_BINARY_DIR}/foveaConfigVersion.cmake
  DESTINATION ${package_dir}
)

file(RELATIVE_PATH fovea_pc_prefix ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
configure_file(cmake/fovea.pc.in fovea.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/fovea.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
