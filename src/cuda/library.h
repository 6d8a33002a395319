#pragma once

#include <dlfcn.h>
#include <fovea/export.h>

#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fovea::cuda {

/// A shared library opened at run time, and never closed: NVIDIA's keep threads and memory of their own.
struct Library {
  explicit Library(const char* file) : handle(::dlopen(file, RTLD_LAZY | RTLD_LOCAL)) {}
  void* handle;
  std::string missing;  ///< the last function that was looked up and not found
};

/// A C function of a library, with its name for error messages.
template <class Signature>
struct LibraryFunction {
  LibraryFunction(Library& library, const char* its_name) : name(its_name) {
    if (library.handle == nullptr) return;
    address = reinterpret_cast<Signature*>(::dlsym(library.handle, name));
    if (address == nullptr) library.missing = name;
  }
  template <class... Arguments>
  auto operator()(Arguments... arguments) const {
    return address(arguments...);
  }

  const char* name;
  Signature* address = nullptr;
};

/// Where a library whose file name begins with `stem` may be, best first: one that is loaded already; `names`, which
/// the system looks up where they have no folder; the folders `wheels` of the Python packages this process uses.
[[nodiscard]] FOVEA_API std::vector<std::string> library_candidates(std::string_view stem,
                                                                    std::span<const char* const> names,
                                                                    std::span<const char* const> wheels);

}  // namespace fovea::cuda
