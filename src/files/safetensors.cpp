#include "files/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

namespace fovea::files {
namespace {

using nlohmann::json;

static_assert(std::endian::native == std::endian::little, "safetensors and .npy data are little-endian");

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kLongestHeader = 16 << 20;  // real headers stay far below; keeps hostile ones cheap
constexpr int kDeepest = 2;                         // { name: { key: [ ... ] } }

struct StoredType {
  const char* name;
  std::int64_t bytes;
  std::optional<DType> as;  // none: known to the format, not read by us
  Elements how = Elements::kAsIs;
};

constexpr std::array<StoredType, 14> kTypes{{
    {"F32", 4, DType::kFloat32},
    {"F16", 2, DType::kFloat16},
    {"BF16", 2, DType::kBFloat16},
    {"BOOL", 1, DType::kBool, Elements::kTruth},  // bytes other than 0 and 1 are no bool to C++
    {"U8", 1, DType::kBool, Elements::kTruth},
    {"I32", 4, DType::kInt32},
    {"I64", 8, DType::kInt32, Elements::kNarrowInt64},
    {"F64", 8, {}},
    {"U64", 8, {}},
    {"U32", 4, {}},
    {"I16", 2, {}},
    {"U16", 2, {}},
    {"I8", 1, {}},
    {"F8_E4M3", 1, {}},
}};

const StoredType* find_type(const std::string& name) {
  const auto found = std::ranges::find_if(kTypes, [&](const StoredType& type) { return name == type.name; });
  return found == kTypes.end() ? nullptr : &*found;
}

const char* stored_name(DType dtype) {
  return std::ranges::find_if(kTypes, [&](const StoredType& type) { return type.as == dtype; })->name;
}

json parse_header(const std::string& text) {
  std::vector<std::set<std::string>> names;  // of the objects being read, outermost first
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > kDeepest && (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start))
      refuse("the header nests deeper than a safetensors header does");
    if (event == json::parse_event_t::object_start) names.emplace_back();
    if (event == json::parse_event_t::object_end) names.pop_back();
    if (event == json::parse_event_t::key && !names.back().insert(parsed.get<std::string>()).second) {
      refuse(fmt::format("the header names {} twice", in_quotes(parsed.get<std::string>())));
    }
    return true;
  };
  try {
    json header = json::parse(text, watch);
    if (!header.is_object()) refuse("the header is no JSON object");
    return header;
  } catch (const json::parse_error& error) {
    refuse(fmt::format("the header is no valid JSON (at its byte {})", error.byte));
  } catch (const json::exception&) {
    refuse("the header holds a number that no size can be");
  }
}

bool is_size(const json& value) {
  constexpr std::uint64_t kLargest = std::numeric_limits<std::int64_t>::max();
  return value.is_number_unsigned() && value.get<std::uint64_t>() <= kLargest;
}

bool is_sizes(const json& value) { return value.is_array() && std::ranges::all_of(value, is_size); }

SafetensorsFile::Entry parse_entry(const json& value) {
  if (!value.is_object()) refuse("it is no JSON object");
  for (const auto& [key, unused] : value.items()) {
    if (key != "dtype" && key != "shape" && key != "data_offsets")
      refuse(fmt::format("it has the unknown key {}", in_quotes(key)));
  }
  if (!value.contains("dtype") || !value["dtype"].is_string()) refuse("it has no dtype");
  if (!value.contains("shape") || !is_sizes(value["shape"])) refuse("it has no shape of sizes from 0 to 2^63 − 1");
  if (!value.contains("data_offsets") || !is_sizes(value["data_offsets"]) || value["data_offsets"].size() != 2) {
    refuse("it has no data_offsets [begin, end]");
  }
  SafetensorsFile::Entry entry;
  entry.dtype = value["dtype"].get<std::string>();
  entry.shape = value["shape"].get<std::vector<std::int64_t>>();
  entry.begin = value["data_offsets"][0].get<std::uint64_t>();
  entry.end = value["data_offsets"][1].get<std::uint64_t>();
  if (entry.begin > entry.end) refuse(fmt::format("it ends at byte {} before it begins at {}", entry.end, entry.begin));
  if (const StoredType* type = find_type(entry.dtype)) {
    const std::int64_t bytes = packed_bytes(entry.shape, type->bytes);
    if (entry.end - entry.begin != static_cast<std::uint64_t>(bytes)) {
      refuse(fmt::format("it has {} bytes of data, but {} {} takes {}", entry.end - entry.begin, entry.dtype,
                         shape_text(entry.shape), bytes));
    }
  }
  return entry;
}

/// A name as JSON has it.
std::string as_json(const std::string& name) {
  try {
    return json(name).dump();
  } catch (const json::type_error&) {
    refuse(fmt::format("the tensor's name {} is not UTF-8, as the format wants it", in_quotes(name)));
  }
}

}  // namespace

void read_elements(std::istream& stream, Elements how, const OwnedTensor& tensor) {
  const auto read = [&](void* to, std::size_t bytes) {
    stream.read(static_cast<char*>(to), static_cast<std::streamsize>(bytes));
    if (static_cast<std::size_t>(stream.gcount()) != bytes) refuse("its data ends early");
  };
  const std::span<std::byte> bytes = tensor.bytes();
  if (how == Elements::kNarrowInt64) {
    for (std::size_t at = 0; at < bytes.size(); at += sizeof(std::int32_t)) {
      std::int64_t wide = 0;
      read(&wide, sizeof wide);
      const auto narrow = static_cast<std::int32_t>(wide);
      if (narrow != wide) refuse(fmt::format("it holds {}, which int32 can't; use values below 2^31", wide));
      std::memcpy(&bytes[at], &narrow, sizeof narrow);
    }
    return;
  }
  read(bytes.data(), bytes.size());
  if (how == Elements::kTruth) {
    for (std::byte& byte : bytes) byte = std::byte{byte != std::byte{0}};
  }
}

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  InputFile file(path);
  return {std::make_unique<std::ifstream>(std::move(file.stream)), file.size, path};
}

SafetensorsFile::SafetensorsFile(std::unique_ptr<std::istream> stream, std::uint64_t size, std::string name)
    : stream_(std::move(stream)), name_(std::move(name)) {
  in_context(name_, [&] {
    read_header(size);
    check_offsets(size - data_start_);
  });
}

void SafetensorsFile::read_header(std::uint64_t size) {
  std::uint64_t length = 0;
  if (size < kLengthBytes) refuse(fmt::format("has {} bytes; a safetensors file begins with 8 of header length", size));
  stream_->read(reinterpret_cast<char*>(&length), kLengthBytes);
  if (!*stream_) refuse("can't be read");
  if (length > size - kLengthBytes) {
    refuse(fmt::format("announces a header of {} bytes, but only {} follow; is it a complete safetensors file?", length,
                       size - kLengthBytes));
  }
  if (length > kLongestHeader)
    refuse(fmt::format("has a header of {} bytes; at most {} are read", length, kLongestHeader));
  data_start_ = kLengthBytes + length;
  std::string text(length, '\0');
  stream_->read(text.data(), static_cast<std::streamsize>(length));
  if (!*stream_) refuse("ends within its header");

  const json header = parse_header(text);
  for (const auto& item : header.items()) {
    const std::string& key = item.key();
    const json& value = item.value();
    if (key == "__metadata__") {
      if (!value.is_object()) refuse("has a __metadata__ that is no JSON object");
      for (const auto& [field, content] : value.items()) {
        if (!content.is_string()) refuse(fmt::format("has a __metadata__ field {} that is no text", in_quotes(field)));
        metadata_[field] = content.get<std::string>();
      }
      continue;
    }
    entries_[key] = in_context("tensor " + in_quotes(key), [&] { return parse_entry(value); });
  }
}

void SafetensorsFile::check_offsets(std::uint64_t data_bytes) const {
  // The format promises that tensors follow each other without gaps or overlaps and fill the file.
  using Pair = std::pair<const std::string, Entry>;
  std::vector<const Pair*> in_order;
  in_order.reserve(entries_.size());
  for (const Pair& pair : entries_) in_order.push_back(&pair);
  std::ranges::sort(in_order, {}, [](const Pair* pair) { return std::pair(pair->second.begin, pair->second.end); });
  std::uint64_t reached = 0;
  for (const Pair* pair : in_order) {
    const auto& [name, entry] = *pair;
    if (entry.end > data_bytes) {
      refuse(fmt::format("tensor {} ends at byte {} of {} bytes of data; the file is cut short or its header is wrong",
                         in_quotes(name), entry.end, data_bytes));
    }
    if (entry.begin != reached) {
      refuse(fmt::format(
          "tensor {} begins at byte {}, {} at {}; tensors must follow each other", in_quotes(name), entry.begin,
          entry.begin < reached ? "inside another that ends" : "after a gap from the end of the last", reached));
    }
    reached = entry.end;
  }
  if (reached != data_bytes) refuse(fmt::format("has {} bytes of data that belong to no tensor", data_bytes - reached));
}

OwnedTensor SafetensorsFile::load(const std::string& tensor) const {
  return in_context(name_ + ": tensor " + in_quotes(tensor), [&] {
    const auto found = entries_.find(tensor);
    if (found == entries_.end())
      refuse(fmt::format("is not there; the file has {}{}", entries_.size(),
                         entries_.empty() ? "" : ", from " + in_quotes(entries_.begin()->first) + " on"));
    const Entry& entry = found->second;
    const StoredType* type = find_type(entry.dtype);
    if (type == nullptr || !type->as)
      refuse(fmt::format("its dtype {} is not read; use F32, F16, BF16, BOOL, U8, I32 or I64", in_quotes(entry.dtype)));
    OwnedTensor loaded(*type->as, entry.shape);
    stream_->clear();
    stream_->seekg(static_cast<std::streamoff>(data_start_ + entry.begin));
    read_elements(*stream_, type->how, loaded);
    return loaded;
  });
}

void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::string text = metadata.empty() ? "{" : fmt::format("{{\"__metadata__\":{}", json(metadata).dump());
  std::int64_t end = 0;
  std::set<std::string> names;
  for (const auto& [name, tensor] : tensors) {
    if (!names.insert(name).second) refuse(fmt::format("{}: two tensors are called {}", path, in_quotes(name)));
    const std::span shape = std::span(tensor.shape).first(tensor.rank);
    const std::int64_t begin = end;
    end += packed_bytes(shape, size_bytes(tensor.dtype));
    text += fmt::format(R"({}{}:{{"dtype":"{}","shape":[{}],"data_offsets":[{},{}]}})", text.size() > 1 ? "," : "",
                        as_json(name), stored_name(tensor.dtype), fmt::join(shape, ","), begin, end);
  }
  text += '}';
  text.resize((kLengthBytes + text.size() + 63) / 64 * 64 - kLengthBytes, ' ');  // the data begins at a multiple of 64
  write_atomically(path, [&](std::ostream& stream) {
    const std::uint64_t length = text.size();
    stream.write(reinterpret_cast<const char*>(&length), kLengthBytes);
    stream.write(text.data(), static_cast<std::streamsize>(length));
    for (const auto& [name, tensor] : tensors) write_packed(stream, tensor);
  });
}

}  // namespace fovea::files
