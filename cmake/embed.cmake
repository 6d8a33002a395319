# fovea_embed(TARGET NAMESPACE FILE...): each FILE becomes a std::string_view of TARGET, named after the file with '.' as
# '_' ("page.css" is NAMESPACE::page_css), declared in the generated header "embedded.h".  Runs again when a file changes.
function(fovea_embed target namespace)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/${target}_embedded)
  list(TRANSFORM ARGN PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/ OUTPUT_VARIABLE files)
  add_custom_command(
    OUTPUT ${folder}/embedded.cpp ${folder}/embedded.h
    COMMAND ${CMAKE_COMMAND} "-DFILES=${files}" -DNAMESPACE=${namespace} -DFOLDER=${folder}
            -P ${CMAKE_CURRENT_FUNCTION_LIST_FILE}
    DEPENDS ${files} ${CMAKE_CURRENT_FUNCTION_LIST_FILE}
    VERBATIM
  )
  target_sources(${target} PRIVATE ${folder}/embedded.cpp ${folder}/embedded.h)
  target_include_directories(${target} PRIVATE ${folder})
endfunction()

if(NOT CMAKE_SCRIPT_MODE_FILE)
  return()
endif()

# Run as a script at build time.
set(declarations "")
set(definitions "")
foreach(file IN LISTS FILES)
  get_filename_component(name ${file} NAME)
  string(MAKE_C_IDENTIFIER ${name} name)
  file(READ ${file} content)
  string(APPEND declarations "extern const std::string_view ${name};\n")
  string(APPEND definitions "const std::string_view ${name} = R\"fovea(${content})fovea\";\n")
endforeach()
file(WRITE ${FOLDER}/embedded.h
  "#pragma once\n#include <string_view>\nnamespace ${NAMESPACE} {\n${declarations}}  // namespace ${NAMESPACE}\n")
file(WRITE ${FOLDER}/embedded.cpp
  "#include \"embedded.h\"\nnamespace ${NAMESPACE} {\n${definitions}}  // namespace ${NAMESPACE}\n")
