#pragma once

#include <cstdint>
#include <istream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "files/tensor_data.h"

namespace fovea::files {

/// A file of named tensors (huggingface/safetensors): 8 bytes of header length, a JSON header, the data.  Nothing in it
/// is trusted: sizes, offsets, names and JSON are checked before any tensor is read, and every fault is an
/// Error(kInvalidArgument) that starts with the file's name.
class SafetensorsFile {
 public:
  /// A tensor as the header describes it.
  struct Entry {
    std::string dtype;  ///< "F32", "BF16", ...; also types this library does not read
    std::vector<std::int64_t> shape;
    std::uint64_t begin = 0;  ///< bytes from the start of the data
    std::uint64_t end = 0;
  };

  [[nodiscard]] static SafetensorsFile open(const std::string& path);
  SafetensorsFile(std::unique_ptr<std::istream> stream, std::uint64_t size, std::string name);

  [[nodiscard]] const std::map<std::string, Entry>& entries() const { return entries_; }
  [[nodiscard]] const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// F32, F16, BF16, BOOL, I32 as they are; U8 becomes bool; I64 becomes int32 where every value fits.
  [[nodiscard]] OwnedTensor load(const std::string& tensor) const;

 private:
  void read_header(std::uint64_t size);
  void check_offsets(std::uint64_t data_bytes) const;

  std::unique_ptr<std::istream> stream_;
  std::string name_;
  std::uint64_t data_start_ = 0;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

/// Writes tensors of any strides, densely packed, in the order given.  All or nothing (write_atomically).
void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

/// What loading does with elements that are not kept as they are; shared with .npy.
enum class Elements : std::uint8_t { kAsIs, kTruth, kNarrowInt64 };

/// Fills the tensor from the stream.  Throws Error(kInvalidArgument) where the stream ends early or an int64 does not
/// fit.
void read_elements(std::istream& stream, Elements how, const OwnedTensor& tensor);

}  // namespace fovea::files
