#include "cuda/jit/disk.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <thread>

#include "cuda/jit/device_text.h"
#include "cuda/jit/record.h"

namespace fovea::cuda::jit {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

constexpr auto kLongestWait = 30s;  // for another process; then a kernel is compiled twice
constexpr auto kBetweenLooks = 5ms;
constexpr std::size_t kLongestName = 120;

/// NAME-KEY-: what the kernel's files begin with.
std::string stem_of(const std::string& name, const std::string& key) {
  return name.substr(0, kLongestName) + "-" + key + "-";
}

/// "nvrtc13.0".
std::string slug(const std::string& compiler) {
  std::string text;
  for (const char c : compiler) {
    if (c != ' ') text += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return text;
}

}  // namespace

fs::path Disk::folder_of(int arch) const { return folder_ / std::string(build_id) / ("sm_" + std::to_string(arch)); }

fs::path Disk::tiles_of(const std::string& gpu) const {
  if (folder_.empty()) return {};
  std::string name = gpu;
  std::ranges::replace_if(
      name, [](unsigned char c) { return std::isalnum(c) == 0; }, '-');
  return folder_ / std::string(build_id) / ("tiles-" + name + ".txt");
}

std::optional<Binary> Disk::find(const KernelRequest& request, const std::string& key, const std::string& compiler,
                                 const std::function<bool(const Binary&)>& serves) const {
  if (folder_.empty()) return {};
  const fs::path folder = folder_of(request.arch);
  const std::string stem = stem_of(request.name, key);
  std::vector<fs::path> files;
  if (!compiler.empty()) {
    files.push_back(folder / (stem + slug(compiler) + ".cubin"));
  } else {
    std::error_code error;
    for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
      if (at->path().filename().string().starts_with(stem) && at->path().extension() == ".cubin") files.push_back(*at);
    }
    std::ranges::sort(files, std::greater<>());  // always the same one, where there are several
  }
  for (const fs::path& file : files) {
    const std::optional<std::string> bytes = read_file(file);
    std::optional<Binary> binary = bytes ? read_record(*bytes, key) : std::nullopt;
    if (!binary || (!compiler.empty() && binary->compiler != compiler)) continue;
    binary->source = Source::kDisk;
    if (!serves || serves(*binary)) return binary;
  }
  return {};
}

void Disk::store(const Binary& binary) const {
  if (folder_.empty()) return;
  const fs::path file = folder_of(binary.arch) / (stem_of(binary.name, binary.key) + slug(binary.compiler) + ".cubin");
  std::error_code ignored;
  fs::create_directories(file.parent_path(), ignored);
  if (write_file(file, record_of(binary))) (void)write_file(fs::path(file).replace_extension(".json"), json_of(binary));
}

FileLock Disk::lock(int arch, const std::string& key) const {
  std::int64_t number = 0;  // one file serves all keys
  std::from_chars(key.data(), key.data() + std::min<std::size_t>(key.size(), 15), number, 16);
  return FileLock(folder_.empty() ? fs::path() : folder_of(arch) / "lock", number);
}

// A number is a byte, which may lie far beyond the end; the lock goes with the descriptor.
FileLock::FileLock(const fs::path& file, std::int64_t number) {
  std::error_code ignored;
  fs::create_directories(file.parent_path(), ignored);
  descriptor_ = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor_ < 0) return;
  struct flock range {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  range.l_start = number;
  range.l_len = 1;
  const auto give_up = std::chrono::steady_clock::now() + kLongestWait;
  while (::fcntl(descriptor_, F_OFD_SETLK, &range) != 0 && (errno == EAGAIN || errno == EACCES || errno == EINTR) &&
         std::chrono::steady_clock::now() < give_up) {
    std::this_thread::sleep_for(kBetweenLooks);
  }
}

FileLock::~FileLock() {
  if (descriptor_ < 0) return;
  struct flock everything {};
  everything.l_type = F_UNLCK;
  ::fcntl(descriptor_, F_OFD_SETLK, &everything);  // a process forked meanwhile has the descriptor, too
  ::close(descriptor_);
}

Disk::Usage Disk::usage() const {
  Usage usage;
  if (folder_.empty()) return usage;
  std::error_code error;
  for (fs::recursive_directory_iterator at(folder_, error), end; !error && at != end; at.increment(error)) {
    std::error_code ignored;
    if (!at->is_regular_file(ignored)) continue;
    const std::uintmax_t bytes = at->file_size(ignored);
    if (ignored) continue;
    usage.kernels += at->path().extension() == ".cubin" ? 1 : 0;
    usage.bytes += static_cast<std::int64_t>(bytes);
  }
  // What does not exist yet can be made where its nearest parent can be written.
  fs::path nearest = folder_;
  while (!fs::exists(nearest, error) && nearest.has_relative_path()) nearest = nearest.parent_path();
  usage.writable =
      fs::is_directory(nearest, error) && ::faccessat(AT_FDCWD, nearest.c_str(), W_OK | X_OK, AT_EACCESS) == 0;
  return usage;
}

}  // namespace fovea::cuda::jit
