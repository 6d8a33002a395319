#pragma once

#include <fovea/error.h>
#include <fovea/tensor.h>

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <functional>
#include <iosfwd>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace fovea::files {

/// Throws Error(kInvalidArgument).
[[noreturn]] inline void refuse(const std::string& sentence) { throw Error(ErrorCode::kInvalidArgument, sentence); }

/// A densely packed tensor together with its memory, aligned to 64 bytes and zero at first.
class OwnedTensor {
 public:
  OwnedTensor() = default;

  /// Throws Error(kInvalidArgument) for more than four dimensions, a negative one or a size beyond 63 bits, and
  /// Error(kOutOfMemory).
  OwnedTensor(DType dtype, std::span<const std::int64_t> shape);

  [[nodiscard]] const Tensor& view() const { return view_; }
  [[nodiscard]] std::span<std::byte> bytes() const { return {memory_.get(), size_}; }

 private:
  struct AlignedDelete {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, AlignedDelete> memory_;
  std::size_t size_ = 0;
  Tensor view_;
};

/// Runs `work`; an Error that leaves it gets `context` in front: "model.safetensors: tensor 'q' ...".
template <class Work>
auto in_context(const std::string& context, const Work& work) {
  try {
    return work();
  } catch (const Error& error) {
    throw Error(error.code(), context + ": " + error.what());
  }
}

/// Bytes of elements packed densely; throws Error(kInvalidArgument) where that is negative or beyond 63 bits.
[[nodiscard]] std::int64_t packed_bytes(std::span<const std::int64_t> shape, std::int64_t element_bytes);

/// The elements of a tensor of any strides, in order, without gaps.
void write_packed(std::ostream& stream, const Tensor& tensor);

/// "[2, 1024, 16, 64]".
[[nodiscard]] std::string shape_text(std::span<const std::int64_t> shape);

/// A text from outside inside quotes, fit for one line: control and non-ASCII bytes are escaped, long texts cut.
[[nodiscard]] std::string in_quotes(std::string_view text);

/// A regular file opened for reading, and its size.  Throws Error(kInvalidArgument) with the path and the system's
/// reason.
struct InputFile {
  explicit InputFile(const std::string& path);
  std::ifstream stream;
  std::uint64_t size = 0;
};

/// Throws Error(kInvalidArgument) unless a file can be made at `path`: what commands ask before they work for long.
void require_writable(const std::string& path);

/// Throws Error(kInvalidArgument) where two options that each name a file to write name the same.
void require_apart(const char* option, const std::string& path, const char* other_option, const std::string& other);

/// Replaces the file at `path` by what `write` writes, all or nothing: it grows under another name in the same folder
/// and takes the path when complete.  Throws Error(kInvalidArgument) where the path can't be written, Error(kDevice)
/// where the disk fails.
void write_atomically(const std::string& path, const std::function<void(std::ostream&)>& write);

}  // namespace fovea::files
