#include "files/tensor_data.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <new>
#include <system_error>

namespace fovea::files {
namespace {

constexpr std::align_val_t kAlignment{64};

std::string system_reason(int code) { return std::generic_category().message(code); }

/// The path that a write reaches in the end: symbolic links are followed, those to no file yet too, so that what is
/// written stays behind its link.
std::filesystem::path target_of(const std::string& path) {
  constexpr int kMostLinks = 40;  // as many as Linux follows
  std::error_code problem;
  std::filesystem::path target = path;
  for (int i = 0; i < kMostLinks && std::filesystem::is_symlink(target, problem); ++i)
    target = target.parent_path() / std::filesystem::read_symlink(target, problem);
  target = std::filesystem::weakly_canonical(target, problem);
  return problem ? std::filesystem::path(path) : target;
}

std::filesystem::path folder_of(const std::filesystem::path& target) {
  return target.has_parent_path() ? target.parent_path() : std::filesystem::path(".");
}

}  // namespace

void OwnedTensor::AlignedDelete::operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }

OwnedTensor::OwnedTensor(DType dtype, std::span<const std::int64_t> shape) {
  if (shape.empty() || shape.size() > Tensor::kMaxRank) {
    refuse(fmt::format("shape {} has {} dimensions; tensors have 1 to {}", shape_text(shape), shape.size(),
                       Tensor::kMaxRank));
  }
  size_ = static_cast<std::size_t>(packed_bytes(shape, size_bytes(dtype)));
  memory_.reset(static_cast<std::byte*>(::operator new(size_ + 1, kAlignment, std::nothrow)));
  if (memory_ == nullptr) {
    throw Error(ErrorCode::kOutOfMemory, fmt::format("a tensor {} of {} bytes could not be allocated; free memory or "
                                                     "use a smaller problem",
                                                     shape_text(shape), size_));
  }
  std::memset(memory_.get(), 0, size_);
  view_.data = memory_.get();
  view_.dtype = dtype;
  view_.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (int i = view_.rank - 1; i >= 0; --i) {
    view_.shape[i] = shape[i];
    view_.strides[i] = stride;
    stride *= shape[i];
  }
}

std::int64_t packed_bytes(std::span<const std::int64_t> shape, std::int64_t element_bytes) {
  std::int64_t bytes = element_bytes;
  bool overflow = false;
  bool empty = false;
  for (const std::int64_t extent : shape) {
    if (extent < 0) refuse(fmt::format("shape {} has a negative dimension", shape_text(shape)));
    empty = empty || extent == 0;
    if (extent > 0) overflow = __builtin_mul_overflow(bytes, extent, &bytes) || overflow;
  }
  // A shape that overflows is refused even beside a 0, so that strides never overflow either.
  if (overflow) refuse(fmt::format("shape {} is larger than any memory", shape_text(shape)));
  return empty ? 0 : bytes;
}

void write_packed(std::ostream& stream, const Tensor& tensor) {
  const std::int64_t element = size_bytes(tensor.dtype);
  const int rows_rank = tensor.rank - 1;
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] == 0) return;
  }
  std::array<std::int64_t, Tensor::kMaxRank> at{};
  while (true) {
    const std::byte* row = static_cast<const std::byte*>(tensor.data);
    for (int i = 0; i < rows_rank; ++i) row += at[i] * tensor.strides[i] * element;
    if (tensor.strides[rows_rank] == 1) {
      stream.write(reinterpret_cast<const char*>(row), tensor.shape[rows_rank] * element);
    } else {
      for (std::int64_t i = 0; i < tensor.shape[rows_rank]; ++i) {
        stream.write(reinterpret_cast<const char*>(row + i * tensor.strides[rows_rank] * element), element);
      }
    }
    int axis = rows_rank - 1;
    while (axis >= 0 && ++at[axis] == tensor.shape[axis]) at[axis--] = 0;
    if (axis < 0) return;
  }
}

std::string shape_text(std::span<const std::int64_t> shape) {
  constexpr std::size_t kMost = 8;  // a hostile file may name millions
  return fmt::format("[{}{}]", fmt::join(shape.first(std::min(shape.size(), kMost)), ", "),
                     shape.size() > kMost ? ", …" : "");
}

std::string in_quotes(std::string_view text) {
  constexpr std::size_t kLongest = 60;
  std::string out = "'";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte >= 0x7f) {
      out += fmt::format("\\x{:02x}", byte);
    } else {
      out += c;
    }
  }
  return out + (text.size() > kLongest ? "…'" : "'");
}

InputFile::InputFile(const std::string& path) {
  if (path.empty()) refuse("the path of a file to read is empty");
  std::error_code problem;
  const auto status = std::filesystem::status(path, problem);
  if (problem || !std::filesystem::exists(status)) {
    refuse(fmt::format("{}: {}", path, problem ? problem.message() : system_reason(ENOENT)));
  }
  if (!std::filesystem::is_regular_file(status)) refuse(path + ": is not a regular file");
  stream.open(path, std::ios::binary);
  if (!stream) refuse(fmt::format("{}: {}", path, system_reason(errno)));
  size = std::filesystem::file_size(path, problem);
  if (problem) refuse(fmt::format("{}: {}", path, problem.message()));
}

void require_writable(const std::string& path) {
  const auto target = target_of(path);
  const auto folder = folder_of(target);
  std::error_code problem;
  const auto status = std::filesystem::status(target, problem);
  if (path.empty()) refuse("the path of a file to write is empty");
  if (!std::filesystem::status_known(status)) refuse(fmt::format("{}: can't be written: {}", path, problem.message()));
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    refuse(path + ": is not a regular file, so it is not replaced");
  }
  if (::access(folder.c_str(), W_OK | X_OK) != 0) {
    refuse(fmt::format("{}: can't be written: {}", path, system_reason(errno)));
  }
}

void require_apart(const char* option, const std::string& path, const char* other_option, const std::string& other) {
  if (path.empty() || other.empty() || target_of(path) != target_of(other)) return;
  refuse(
      fmt::format("{} {} and {} {} are one file; name two", option, in_quotes(path), other_option, in_quotes(other)));
}

void write_atomically(const std::string& path, const std::function<void(std::ostream&)>& write) {
  require_writable(path);
  const auto target = target_of(path);
  static std::atomic<unsigned> writes{0};                              // so that no two threads grow one file
  const std::string stem = target.filename().string().substr(0, 200);  // of a name, which may have 255 bytes
  const auto growing = folder_of(target) / fmt::format("{}.{}.{}.part", stem, ::getpid(), writes++);
  std::ofstream stream(growing, std::ios::binary | std::ios::trunc);
  if (!stream) refuse(fmt::format("{}: can't be written: {}", path, system_reason(errno)));
  std::error_code problem;
  try {
    if (const auto before = std::filesystem::status(target, problem); std::filesystem::exists(before))
      std::filesystem::permissions(growing, before.permissions());
    errno = 0;
    write(stream);
    stream.close();
    if (!stream) {
      throw Error(ErrorCode::kDevice, fmt::format("{}: writing failed: {}", path, system_reason(errno ? errno : EIO)));
    }
    std::filesystem::rename(growing, target);
  } catch (const std::filesystem::filesystem_error& failure) {
    std::filesystem::remove(growing, problem);
    throw Error(ErrorCode::kDevice, fmt::format("{}: can't be replaced: {}", path, failure.code().message()));
  } catch (...) {
    std::filesystem::remove(growing, problem);
    throw;
  }
}

}  // namespace fovea::files
