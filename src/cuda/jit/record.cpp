#include "cuda/jit/record.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <fstream>

#include "cuda/jit/sha256.h"

namespace fovea::cuda::jit {
namespace {

constexpr std::string_view kMagic = "\nfovea-kernel-1 ";
constexpr std::size_t kLengthDigits = 8, kHashDigits = 64;
constexpr std::size_t kFooterBytes = kMagic.size() + kLengthDigits + 1 + kHashDigits + 1;
constexpr std::uint64_t kMostBytes = std::uint64_t{1} << 28;  // no kernel is larger

std::string footer_of(std::string_view body, std::size_t json_bytes) {
  std::array<char, kLengthDigits + 1> length{};
  std::snprintf(length.data(), length.size(), "%08x", static_cast<unsigned>(json_bytes));
  return std::string(kMagic) + length.data() + " " + sha256(std::string(body) + length.data()) + "\n";
}

/// A value of JSON that json_of has written.
std::string_view value_of(std::string_view json, const std::string& field) {
  const std::string label = "\"" + field + "\": ";
  const std::size_t at = json.find(label);
  if (at == std::string_view::npos) return {};
  json.remove_prefix(at + label.size());
  if (!json.starts_with('"')) return json.substr(0, json.find_first_of(",\n"));
  json.remove_prefix(1);
  return json.substr(0, json.find('"'));
}

template <class Number>
Number number_of(std::string_view json, const std::string& field) {
  const std::string_view text = value_of(json, field);
  Number number{};
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

}  // namespace

std::string json_of(const Binary& binary) {
  std::array<char, 32> seconds{};
  const auto end = std::to_chars(seconds.data(), seconds.data() + seconds.size(), binary.seconds).ptr;
  std::string json = "{\n";
  const auto add = [&](const char* field, const std::string& value) {
    json.append("  \"").append(field).append("\": ").append(value).append(",\n");
  };
  add("name", "\"" + binary.name + "\"");
  add("arch", std::to_string(binary.arch));
  add("compiler", "\"" + binary.compiler + "\"");
  add("registers", std::to_string(binary.registers));
  add("spill_bytes", std::to_string(binary.spill_bytes));
  add("local_bytes", std::to_string(binary.local_bytes));
  add("shared_bytes", std::to_string(binary.shared_bytes));
  add("warnings", "\"" + binary.warnings + "\"");
  add("seconds", std::string(seconds.data(), end));
  return json + "  \"key\": \"" + binary.key + "\"\n}\n";
}

std::string record_of(const Binary& binary) {
  const std::string json = json_of(binary), body = binary.cubin + json;
  return body + footer_of(body, json.size());
}

std::optional<Binary> read_record(std::string_view record, std::string_view key) {
  if (record.size() < kFooterBytes) return {};
  const std::string_view footer = record.substr(record.size() - kFooterBytes);
  const std::string_view body = record.substr(0, record.size() - kFooterBytes);
  std::size_t length = 0;
  const char* digits = footer.data() + kMagic.size();
  std::from_chars(digits, digits + kLengthDigits, length, 16);
  if (length > body.size() || footer != footer_of(body, length)) return {};
  const std::string_view json = body.substr(body.size() - length);
  if (value_of(json, "key") != key) return {};
  Binary binary;
  binary.key = key;
  binary.name = value_of(json, "name");
  binary.arch = number_of<int>(json, "arch");
  binary.compiler = value_of(json, "compiler");
  binary.registers = number_of<int>(json, "registers");
  binary.spill_bytes = number_of<int>(json, "spill_bytes");
  binary.local_bytes = number_of<int>(json, "local_bytes");
  binary.shared_bytes = number_of<int>(json, "shared_bytes");
  binary.warnings = value_of(json, "warnings");
  binary.seconds = number_of<double>(json, "seconds");
  binary.cubin = body.substr(0, body.size() - length);
  return binary;
}

std::optional<std::string> read_file(const std::filesystem::path& file, std::uint64_t offset, std::uint64_t bytes) {
  std::error_code error;
  const std::uint64_t size = std::filesystem::file_size(file, error);  // an error for what is no regular file
  if (error || offset > size) return {};
  bytes = std::min(bytes, size - offset);
  if (bytes > kMostBytes) return {};
  std::string content(bytes, '\0');
  std::ifstream stream(file, std::ios::binary);
  stream.seekg(static_cast<std::streamoff>(offset));
  stream.read(content.data(), static_cast<std::streamsize>(bytes));
  if (!stream) return {};
  return content;
}

bool write_file(const std::filesystem::path& file, std::string_view bytes) {
  std::string growing = file.string() + ".XXXXXX";
  const int descriptor = ::mkstemp(growing.data());
  if (descriptor < 0) return false;
  bool good = true;
  while (good && !bytes.empty()) {
    const ssize_t written = ::write(descriptor, bytes.data(), bytes.size());
    good = written > 0;
    if (good) bytes.remove_prefix(static_cast<std::size_t>(written));
  }
  good = ::fchmod(descriptor, S_IRUSR | S_IWUSR | S_IRGRP | S_IROTH) == 0 && good;  // mkstemp's own is for one user
  good = ::close(descriptor) == 0 && good;
  good = good && ::rename(growing.c_str(), file.c_str()) == 0;
  if (!good) ::unlink(growing.c_str());
  return good;
}

}  // namespace fovea::cuda::jit
