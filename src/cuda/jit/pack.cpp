#include "cuda/jit/pack.h"

#include <fovea/error.h>

#include <array>
#include <cstdio>
#include <sstream>

#include "cuda/jit/device_text.h"
#include "cuda/jit/record.h"
#include "cuda/jit/sha256.h"

namespace fovea::cuda::jit {
namespace {

constexpr const char* kMagic = "fovea-pack-1";
constexpr std::size_t kLineBytes = 32 + 1 + 16 + 1 + 16 + 1;  // of the index
constexpr std::size_t kHeadBytes = 12 + 1 + 16 + 1 + 8 + 1 + 64 + 1;

std::string hex(std::uint64_t value, int digits) {
  std::array<char, 24> text{};
  std::snprintf(text.data(), text.size(), "%0*llx", digits, static_cast<unsigned long long>(value));
  return text.data();
}

}  // namespace

void Pack::write(const std::filesystem::path& file, std::span<const Binary> binaries) {
  std::map<std::string, std::string> records;
  for (const Binary& binary : binaries) records[binary.key] = record_of(binary);
  std::string index, body;
  const std::uint64_t start = kHeadBytes + kLineBytes * records.size();
  for (const auto& [key, record] : records) {
    index += key + " " + hex(start + body.size(), 16) + " " + hex(record.size(), 16) + "\n";
    body += record;
  }
  const std::string head =
      std::string(kMagic) + " " + std::string(build_id) + " " + hex(records.size(), 8) + " " + sha256(index) + "\n";
  if (!write_file(file, head + index + body)) {
    throw Error(ErrorCode::kDevice, "pack " + file.string() + " cannot be written; look at the folder and the disk");
  }
}

Pack Pack::open(const std::filesystem::path& file) {
  const auto refuse = [&](const char* why) {
    return Error(ErrorCode::kInvalidArgument,
                 "pack " + file.string() + " " + why + "; make it anew by fovea precompile");
  };
  const std::optional<std::string> head = read_file(file, 0, kHeadBytes);
  if (!head) throw refuse("cannot be read");
  Pack pack;
  pack.file_ = file;
  std::istringstream words(*head);
  std::string magic, hash;
  std::uint64_t count = 0;
  if (!(words >> magic >> pack.build_ >> std::hex >> count >> hash) || magic != kMagic) throw refuse("is no pack");
  const std::optional<std::string> index = read_file(file, kHeadBytes, kLineBytes * count);
  if (!index || sha256(*index) != hash) throw refuse("is damaged");
  std::istringstream lines(*index);
  lines >> std::hex;
  std::string key;
  for (Place place{}; lines >> key >> place.offset >> place.bytes;) pack.index_[key] = place;
  return pack;
}

std::optional<Binary> Pack::find(const std::string& key) const {
  const auto found = index_.find(key);
  if (found == index_.end()) return {};
  const std::optional<std::string> record = read_file(file_, found->second.offset, found->second.bytes);
  std::optional<Binary> binary = record ? read_record(*record, key) : std::nullopt;
  if (binary) binary->source = Source::kPack;
  return binary;
}

}  // namespace fovea::cuda::jit
