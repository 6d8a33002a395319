# fovea_embed_device_text(TARGET GLOB...): the headers that GPU kernels are compiled from, become cuda/jit/device_text.h's
# `device_text` of TARGET, sorted by their paths below this folder, and `build_id`, a hash of all of them.
function(fovea_embed_device_text target)
  set(output ${CMAKE_CURRENT_BINARY_DIR}/device_text.cpp)
  file(GLOB files CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR} ${ARGN})
  list(SORT files COMPARE STRING)
  list(TRANSFORM files PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/ OUTPUT_VARIABLE inputs)
  add_custom_command(
    OUTPUT ${output}
    COMMAND ${CMAKE_COMMAND} "-DFILES=${files}" -DROOT=${CMAKE_CURRENT_SOURCE_DIR} -DOUTPUT=${output}
            -P ${CMAKE_CURRENT_FUNCTION_LIST_FILE}
    DEPENDS ${inputs} ${CMAKE_CURRENT_FUNCTION_LIST_FILE}
    VERBATIM
  )
  target_sources(${target} PRIVATE ${output})
endfunction()

if(NOT CMAKE_SCRIPT_MODE_FILE)
  return()
endif()

# Run as a script at build time.
set(entries "")
set(hashes "")
foreach(file IN LISTS FILES)
  file(READ ${ROOT}/${file} content)
  file(SHA256 ${ROOT}/${file} hash)
  string(APPEND entries "    {\"${file}\", R\"fovea(${content})fovea\"},\n")
  string(APPEND hashes "${file} ${hash}\n")
endforeach()
string(SHA256 build_id "${hashes}")
string(SUBSTRING ${build_id} 0 16 build_id)
file(WRITE ${OUTPUT} "#include \"cuda/jit/device_text.h\"

namespace fovea::cuda::jit {
namespace {
constexpr Header kFiles[] = {
${entries}};
}  // namespace

const std::span<const Header> device_text = kFiles;
const std::string_view build_id = \"${build_id}\";
}  // namespace fovea::cuda::jit
")
