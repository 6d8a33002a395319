#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "cuda/jit/request.h"

// A compiled kernel as a file's bytes: the cubin, which tools read as it is, then what is known of it as JSON, then a
// line with the length of that and a checksum of everything.
namespace fovea::cuda::jit {

[[nodiscard]] std::string json_of(const Binary& binary);
[[nodiscard]] std::string record_of(const Binary& binary);

/// Nothing where the bytes are damaged or are not the kernel of this key.
[[nodiscard]] std::optional<Binary> read_record(std::string_view record, std::string_view key);

/// A regular file's bytes, or some of them; nothing where they cannot be read.
[[nodiscard]] std::optional<std::string> read_file(const std::filesystem::path& file, std::uint64_t offset = 0,
                                                   std::uint64_t bytes = ~std::uint64_t{0});

/// All or nothing: the file grows under another name beside `file` and takes its place when complete.
[[nodiscard]] bool write_file(const std::filesystem::path& file, std::string_view bytes);

}  // namespace fovea::cuda::jit
