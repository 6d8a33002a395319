#pragma once

#include <istream>
#include <string>

#include "files/tensor_data.h"

namespace fovea::tools {

/// One NumPy array (.npy, header versions 1 to 3), C order, little-endian: <f4, <f2, <V2 (how NumPy stores bfloat16),
/// |b1, |u1 (becomes bool), <i4, <i8 (becomes int32 where every value fits).  Anything else, and a file longer or
/// shorter than its shape, is an Error(kInvalidArgument) that starts with the file's name.
[[nodiscard]] files::OwnedTensor read_npy(const std::string& path);
[[nodiscard]] files::OwnedTensor read_npy(std::istream& stream, std::uint64_t size, const std::string& name);

}  // namespace fovea::tools
