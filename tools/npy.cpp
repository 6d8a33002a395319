#include "npy.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <set>
#include <vector>

#include "files/safetensors.h"
#include "problem/refuse.h"

namespace fovea::tools {
namespace {

struct ArrayType {
  const char* descr;
  std::int64_t bytes;
  DType as;
  files::Elements how = files::Elements::kAsIs;
};

constexpr std::array<ArrayType, 8> kTypes{{
    {"<f4", 4, DType::kFloat32},
    {"<f2", 2, DType::kFloat16},
    {"<V2", 2, DType::kBFloat16},
    {"|V2", 2, DType::kBFloat16},
    {"|b1", 1, DType::kBool, files::Elements::kTruth},
    {"|u1", 1, DType::kBool, files::Elements::kTruth},
    {"<i4", 4, DType::kInt32},
    {"<i8", 8, DType::kInt32, files::Elements::kNarrowInt64},
}};

struct Header {
  std::string descr;
  bool fortran_order = false;
  std::vector<std::int64_t> shape;
};

/// Reads the Python dictionary of a header: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }
class HeaderReader {
 public:
  explicit HeaderReader(std::string_view text) : rest_(text) {}

  Header read() {
    Header header;
    std::set<std::string> seen;
    expect('{');
    while (!accept('}')) {
      const std::string key = string();
      if (!seen.insert(key).second) refuse(fmt::format("its header names {} twice", files::in_quotes(key)));
      expect(':');
      if (key == "descr") {
        header.descr = string();
      } else if (key == "fortran_order") {
        header.fortran_order = boolean();
      } else if (key == "shape") {
        header.shape = tuple();
      } else {
        refuse(fmt::format("its header has the unknown key {}", files::in_quotes(key)));
      }
      if (!accept(',')) {
        expect('}');
        break;
      }
    }
    skip_space();
    if (!rest_.empty()) malformed();
    if (seen.size() != 3) refuse("its header must name descr, fortran_order and shape");
    return header;
  }

 private:
  [[noreturn]] void malformed() const {
    refuse(fmt::format("its header is not understood at {}", files::in_quotes(rest_.substr(0, 20))));
  }
  void skip_space() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\n"), rest_.size())); }

  bool accept(std::string_view token) {
    skip_space();
    if (!rest_.starts_with(token)) return false;
    rest_.remove_prefix(token.size());
    return true;
  }
  bool accept(char token) { return accept(std::string_view(&token, 1)); }
  void expect(char token) {
    if (!accept(token)) malformed();
  }

  std::string string() {
    skip_space();
    if (rest_.empty() || (rest_[0] != '\'' && rest_[0] != '"')) {
      if (accept('[')) refuse("it is a structured array; save one plain array");
      malformed();
    }
    const std::size_t end = rest_.find(rest_[0], 1);
    if (end == std::string_view::npos) malformed();
    std::string value(rest_.substr(1, end - 1));
    rest_.remove_prefix(end + 1);
    return value;
  }

  bool boolean() {
    if (accept("True")) return true;
    if (!accept("False")) malformed();
    return false;
  }

  std::vector<std::int64_t> tuple() {
    std::vector<std::int64_t> values;
    expect('(');
    while (!accept(')')) {
      skip_space();
      std::int64_t value = 0;
      const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
      if (error != std::errc{}) malformed();
      rest_.remove_prefix(static_cast<std::size_t>(end - rest_.data()));
      values.push_back(value);
      if (!accept(',')) {
        expect(')');
        break;
      }
    }
    return values;
  }

  std::string_view rest_;
};

files::OwnedTensor read_array(std::istream& stream, std::uint64_t size) {
  std::array<unsigned char, 12> start{};  // magic, version, header length in 2 (version 1) or 4 bytes
  stream.read(reinterpret_cast<char*>(start.data()), start.size());
  if (stream.gcount() < 10 || std::memcmp(start.data(), "\x93NUMPY", 6) != 0) refuse("is no .npy file");
  const int version = start[6];
  if (version < 1 || version > 3) refuse(fmt::format("has .npy version {}; 1 to 3 are read", version));
  const std::uint64_t header_start = version == 1 ? 10 : 12;
  std::uint64_t length = start[8] | start[9] << 8;
  if (version > 1) length |= static_cast<std::uint64_t>(start[10]) << 16 | static_cast<std::uint64_t>(start[11]) << 24;
  if (size < header_start || length > size - header_start) {
    refuse(fmt::format("announces a header of {} bytes in a file of {}; is it complete?", length, size));
  }
  constexpr std::uint64_t kLongestHeader = std::uint64_t{1} << 20;
  if (length > kLongestHeader)
    refuse(fmt::format("has a header of {} bytes; at most {} are read", length, kLongestHeader));
  std::string text(length, '\0');
  stream.clear();
  stream.seekg(static_cast<std::streamoff>(header_start));
  stream.read(text.data(), static_cast<std::streamsize>(length));
  if (!stream) refuse("can't be read");

  const Header header = HeaderReader(text).read();
  if (header.fortran_order) refuse("is in Fortran order; save numpy.ascontiguousarray(array)");
  const auto type = std::ranges::find_if(kTypes, [&](const ArrayType& t) { return header.descr == t.descr; });
  if (type == kTypes.end()) {
    refuse(fmt::format("has dtype {}; use <f4, <f2, <V2 (bfloat16), |b1, |u1, <i4 or <i8",
                       files::in_quotes(header.descr)));
  }
  const std::int64_t expected = files::packed_bytes(header.shape, type->bytes);
  const std::uint64_t there = size - header_start - length;
  if (there != static_cast<std::uint64_t>(expected)) {
    refuse(fmt::format("has {} bytes of data, but {} {} takes {}", there, header.descr, files::shape_text(header.shape),
                       expected));
  }
  files::OwnedTensor tensor(type->as, header.shape);
  files::read_elements(stream, type->how, tensor);
  return tensor;
}

}  // namespace

files::OwnedTensor read_npy(std::istream& stream, std::uint64_t size, const std::string& name) {
  return files::in_context(name, [&] { return read_array(stream, size); });
}

files::OwnedTensor read_npy(const std::string& path) {
  files::InputFile file(path);
  return read_npy(file.stream, file.size, path);
}

}  // namespace fovea::tools
