// The rooms between a spec and a kernel: rendering, keys, records, packs, the disk, and what may go wrong in each.  But
// for NVRTC's own tests, which are skipped where there is none, a toy compiler stands in its place.
#include <fcntl.h>
#include <fovea/error.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <fstream>
#include <iterator>
#include <set>
#include <thread>

#include "cuda/jit/cache.h"
#include "cuda/jit/device_text.h"
#include "cuda/jit/record.h"
#include "cuda/jit/render.h"
#include "cuda/jit/sha256.h"
#include "cuda/jit/wgmma_text.h"
#include "tests/support.h"

namespace fovea::cuda::jit {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;
using test::contains;
using test::words;

constexpr Template kForward{.function = "forward",
                            .header = "cuda/kernels/forward.cuh",
                            .spec = "ForwardSpec",
                            .params = "ForwardParams",
                            .threads = 128,
                            .min_blocks = 2};

const KernelRequest kToy{.name = "toy", .unit = "a toy's source", .arch = 80};

/// Compiles anything at once; the "cubin" is the unit.
Binary toy_binary(const KernelRequest& request) {
  Binary binary;
  binary.key = content_key(request);
  binary.name = request.name;
  binary.arch = request.arch;
  binary.compiler = "Toy 1.0";
  binary.registers = 77;
  binary.shared_bytes = 1024;
  binary.seconds = 0.25;
  binary.cubin = "cubin of " + request.unit;
  return binary;
}

class Jit : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = fs::temp_directory_path() / "fovea-jit-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder_ = name;
    ::chmod(name.c_str(), 0755);
  }
  void TearDown() override { fs::remove_all(folder_); }

  [[nodiscard]] Compiler toy(const std::string& name = "Toy 1.0") {
    return {.name = [name](bool) { return name; },
            .compile =
                [this, name](const KernelRequest& request) {
                  if (name.empty()) throw Error(ErrorCode::kDevice, "there is no compiler");
                  ++compiled_;
                  Binary binary = toy_binary(request);
                  binary.compiler = name;
                  return binary;
                }};
  }
  [[nodiscard]] Cache::Options options(Mode mode = Mode::kOn, const std::string& compiler = "Toy 1.0") {
    return {.mode = mode, .folder = folder_ / "cache", .packs = {}, .compiler = toy(compiler)};
  }

  /// What a new process would get.
  std::shared_ptr<const Binary> fresh(const KernelRequest& request = kToy) { return Cache(options()).binary(request); }

  [[nodiscard]] std::vector<fs::path> files(const std::string& extension) const {
    std::vector<fs::path> found;
    if (!fs::exists(folder_)) return found;
    for (const auto& entry : fs::recursive_directory_iterator(folder_)) {
      if (entry.path().extension() == extension) found.push_back(entry.path());
    }
    return found;
  }

  fs::path folder_;
  std::atomic<int> compiled_ = 0;
};

std::string content(const fs::path& file) { return read_file(file).value_or("(unreadable)"); }
void overwrite(const fs::path& file, const std::string& bytes) { std::ofstream(file, std::ios::binary) << bytes; }

// ---- rendering

TEST(Render, SaysEveryFieldAndNamesWhatMatters) {
  ForwardSpec spec;
  spec.type = Type::kFloat16;
  spec.mma = Mma::kHalf8;
  spec.async_copy = false;
  spec.head_dim = spec.head_dim_v = 128;
  spec.band = true;
  spec.bias = true;
  spec.bias_type = Type::kFloat16;
  const KernelRequest request = render(kForward, spec, 75);
  EXPECT_EQ(request.name, "forward_fp16_half8_no_async_copy_d128_band_bias_bias_type_fp16");
  EXPECT_EQ(request.arch, 75);
  EXPECT_TRUE(request.unit.starts_with(R"(#include "cuda/kernels/forward.cuh"

namespace fovea::cuda {

constexpr ForwardSpec kSpec{
    .type = Type::kFloat16,
    .mma = Mma::kHalf8,
    .async_copy = false,
    .head_dim = 128,
)")) << request.unit;
  EXPECT_TRUE(request.unit.ends_with(R"(};

extern "C" __global__ __launch_bounds__(128, 2) void fovea_kernel(const __grid_constant__ ForwardParams params) {
  forward<kSpec>(params);
}

}  // namespace fovea::cuda
)")) << request.unit;
  each_field(spec,
             [&](const std::string& field, auto) { EXPECT_TRUE(contains(request.unit, "\n    ." + field + " = ")); });
}

TEST(Render, IsStable) {
  const KernelRequest a = render(kForward, ForwardSpec{}, 80), b = render(kForward, ForwardSpec{}, 80);
  EXPECT_EQ(a.unit, b.unit);
  EXPECT_EQ(a.name, "forward_bf16_d64");
  EXPECT_EQ(content_key(a), content_key(b));
  EXPECT_EQ(render(kForward, BackwardSpec{.head_dim_v = 32, .deterministic = true}, 80).name,
            "forward_bf16_d64_dv32_deterministic");
}

TEST(Render, TakesTextThatATemplateNeedsAndWhatItIsMadeFor) {
  Template kernel = kForward;
  kernel.text = "struct Toy {};\n\n";
  kernel.arch_specific = true;
  const KernelRequest request = render(kernel, ForwardSpec{}, 90);
  EXPECT_TRUE(contains(request.unit, "namespace fovea::cuda {\n\nstruct Toy {};\n\nconstexpr ForwardSpec kSpec{"));
  EXPECT_EQ(target_of(request), "sm_90a");
  EXPECT_EQ(target_of(render(kForward, ForwardSpec{}, 90)), "sm_90");
  EXPECT_NE(content_key(request), content_key(render(kForward, ForwardSpec{}, 90)));
}

/// How often `part` stands in `text`.
int count(const std::string& text, const std::string& part) {
  int times = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++times;
  return times;
}

TEST(Render, NamesEveryRegisterOfAProductOnce) {
  for (const int columns : {8, 80, 128, 256}) {
    const std::string text = wgmma_text(Type::kFloat16, {columns});
    EXPECT_TRUE(contains(text, "m64n" + std::to_string(columns) + "k16.f32.f16.f16"));
    for (int i = 0; i < columns / 2; ++i) {
      const std::string result = "\"+f\"(c[" + std::to_string(i / 4) + "].x[" + std::to_string(i % 4) + "])";
      EXPECT_EQ(count(text, result), 3) << "one in each of the three products: " << result;
    }
    EXPECT_FALSE(contains(text, "c[" + std::to_string(columns / 8) + "]"));
    // Behind the results: A in one or four operands, B, and whether something is added to.
    const std::string first = "%" + std::to_string(columns / 2);
    EXPECT_TRUE(contains(text, "}, \"\n        \"" + first + ", %" + std::to_string(columns / 2 + 1) + ", more"));
    EXPECT_TRUE(contains(text, "{" + first + ", "));
    EXPECT_TRUE(contains(text, ", %" + std::to_string(columns / 2 + 5) + ", 0;"));
    // Which of A and B in shared memory lie by columns: neither, or B.
    EXPECT_EQ(count(text, "more, 1, 1, 0, 0; }"), 1);
    EXPECT_EQ(count(text, "more, 1, 1, 0, 1; }"), 1);
    EXPECT_EQ(count(text, "more, 1, 1, 1; }"), 1);
  }
  EXPECT_EQ(wgmma_text(Type::kBFloat16, {64, 64}), wgmma_text(Type::kBFloat16, {64})) << "defined once";
}

TEST(Key, IsTheContentsAndNothingElse) {
  std::set<std::string> keys{content_key(kToy)};
  KernelRequest other = kToy;
  other.arch = 86;
  EXPECT_TRUE(keys.insert(content_key(other)).second);
  other = kToy;
  other.unit += " ";
  EXPECT_TRUE(keys.insert(content_key(other)).second);
  other = kToy;
  other.name = "renamed";
  EXPECT_FALSE(keys.insert(content_key(other)).second);
  for (const std::string& key : keys) EXPECT_EQ(key.size(), 32U);
}

TEST(Key, HashesAsFips180Does) {
  EXPECT_EQ(sha256(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(sha256(std::string(1'000'000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(DeviceText, IsEmbeddedSortedAndHashed) {
  std::vector<std::string> names;
  for (const Header& header : device_text) names.emplace_back(header.name);
  EXPECT_TRUE(std::ranges::is_sorted(names));
  EXPECT_NE(std::ranges::find(names, "math/band.h"), names.end());
  EXPECT_NE(std::ranges::find(names, "cuda/spec.h"), names.end());
  EXPECT_EQ(build_id.size(), 16U);
}

TEST(Arch, OfAGpuIsTheNewestOfItsGeneration) {
  EXPECT_EQ(arch_of(75), 75);
  EXPECT_EQ(arch_of(80), 80);
  EXPECT_EQ(arch_of(86), 86);
  EXPECT_EQ(arch_of(89), 89);
  EXPECT_EQ(arch_of(90), 90);
  EXPECT_EQ(arch_of(103), 100);
  EXPECT_EQ(arch_of(121), 120);
  EXPECT_EQ(arch_of(70), 0);
  EXPECT_EQ(arch_of(200), 0);
}

TEST(Log, ALossThatTheAssemblerCallsInformationIsAWarning) {
  Binary binary;
  read_log("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n", binary);
  EXPECT_TRUE(contains(binary.warnings, "C7510")) << binary.warnings;
}

TEST(Log, IsReadForWhatMattersAndForWarnings) {
  Binary binary;
  read_log(
      "toy.cu(3): warning #177-D: variable \"x\" was declared but never referenced\n\n"
      "ptxas info    : 0 bytes gmem\n"
      "ptxas info    : Compiling entry function 'fovea_kernel' for 'sm_80'\n"
      "ptxas info    : Function properties for fovea_kernel\n"
      "ptxas         .     264 bytes stack frame, 314 bytes spill stores, 24 bytes spill loads\n"
      "ptxas info    : Used 56 registers, used 1 barriers, 308 bytes smem, 360 bytes cmem[0]\n"
      "ptxas warning : something is serialized\n",
      binary);
  EXPECT_EQ(binary.registers, 56);
  EXPECT_EQ(binary.spill_bytes, 338);
  EXPECT_EQ(binary.local_bytes, 264);
  EXPECT_EQ(binary.shared_bytes, 308);
  EXPECT_TRUE(binary.warnings.starts_with("toy.cu(3): warning"));
  EXPECT_TRUE(binary.warnings.ends_with(" | ptxas warning : something is serialized"));
}

// ---- records

TEST(Record, RoundTrips) {
  Binary binary = toy_binary(kToy);
  binary.spill_bytes = 12;
  binary.local_bytes = 8;
  binary.warnings = "toy.cu(3): warning, 'x' | another";
  binary.cubin = std::string("\0\x7f", 2) + "ELF\n\"key\": \"no\"";
  const std::string record = record_of(binary);
  EXPECT_TRUE(record.starts_with(binary.cubin)) << "cuobjdump reads the file as it is";
  const std::optional<Binary> read = read_record(record, binary.key);
  ASSERT_TRUE(read);
  EXPECT_EQ(read->cubin, binary.cubin);
  EXPECT_EQ(record_of(*read), record);
  EXPECT_EQ(read->spill_bytes, 12);
  EXPECT_EQ(read->warnings, binary.warnings);
  EXPECT_EQ(read->seconds, 0.25);
}

TEST(Record, IsRefusedWhereABitIsWrongOrAnythingIsMissing) {
  const Binary binary = toy_binary(kToy);
  const std::string record = record_of(binary);
  for (std::size_t i = 0; i < record.size(); ++i) {
    std::string damaged = record;
    damaged[i] = static_cast<char>(damaged[i] ^ 1);
    EXPECT_FALSE(read_record(damaged, binary.key)) << "byte " << i;
    EXPECT_FALSE(read_record(record.substr(0, i), binary.key)) << "the first " << i;
    EXPECT_FALSE(read_record(record.substr(i + 1), binary.key)) << "all but the first " << i + 1;
  }
  EXPECT_FALSE(read_record(record, std::string(32, '0'))) << "another kernel's";
}

// ---- the cache

TEST_F(Jit, CompilesOnceThenRemembers) {
  Cache cache(options());
  EXPECT_EQ(cache.find(kToy), nullptr);
  const auto first = cache.binary(kToy);
  EXPECT_EQ(first->source, Source::kCompiled);
  EXPECT_EQ(cache.binary(kToy), first);
  EXPECT_EQ(cache.find(kToy), first);
  const auto second = fresh();
  EXPECT_EQ(second->source, Source::kDisk);
  EXPECT_EQ(second->cubin, first->cubin);
  EXPECT_EQ(second->registers, 77);
  EXPECT_EQ(compiled_, 1);
  const std::vector<fs::path> cubins = files(".cubin"), notes = files(".json");
  ASSERT_EQ(cubins.size(), 1U);
  EXPECT_EQ(cubins[0].lexically_relative(folder_),
            fs::path("cache") / std::string(build_id) / "sm_80" / ("toy-" + content_key(kToy) + "-toy1.0.cubin"));
  ASSERT_EQ(notes.size(), 1U);
  EXPECT_EQ(content(notes[0]), json_of(*first));
  EXPECT_EQ(Cache(options()).disk().usage().kernels, 1);
}

TEST_F(Jit, WithoutAFolderKeepsInMemoryAlone) {
  Cache::Options none = options();
  none.folder.clear();
  Cache cache(none);
  EXPECT_EQ(cache.binary(kToy), cache.binary(kToy));
  EXPECT_EQ(compiled_, 1);
  EXPECT_TRUE(files(".cubin").empty());
}

TEST_F(Jit, AnotherCompilerIsAnotherKernelUnlessNoneIsThere) {
  (void)fresh();
  EXPECT_EQ(Cache(options(Mode::kOn, "Toy 2.0")).binary(kToy)->compiler, "Toy 2.0");
  EXPECT_EQ(compiled_, 2);
  EXPECT_EQ(Cache(options(Mode::kOn, "")).binary(kToy)->compiler, "Toy 2.0");
  EXPECT_EQ(Cache(options(Mode::kCache)).binary(kToy)->source, Source::kDisk);
  EXPECT_EQ(compiled_, 2);
}

TEST_F(Jit, DamagedFilesAreRebuilt) {
  (void)fresh();
  const fs::path file = files(".cubin").at(0);
  const std::string good = content(file);
  KernelRequest another = kToy;
  another.unit = "another source";
  std::string flipped = good;
  flipped[3] ^= 4;
  const std::vector<std::string> faults{"",
                                        "x",
                                        good.substr(0, good.size() / 2),
                                        good + "\n",
                                        flipped,
                                        record_of(toy_binary(another)),
                                        std::string(1 << 20, '\0')};
  int expected = 1;
  for (const std::string& fault : faults) {
    overwrite(file, fault);
    const auto binary = fresh();
    EXPECT_EQ(binary->source, Source::kCompiled);
    EXPECT_EQ(compiled_, ++expected);
    EXPECT_EQ(content(file), good) << "rebuilt";
  }
  EXPECT_EQ(fresh()->source, Source::kDisk);
}

TEST_F(Jit, WhatIsNoFileBreaksNothing) {
  (void)fresh();
  const fs::path file = files(".cubin").at(0);
  fs::remove(file);
  ASSERT_EQ(::mkfifo(file.c_str(), 0600), 0);  // opening it would wait for ever
  EXPECT_EQ(fresh()->source, Source::kCompiled);
  fs::remove(file);
  fs::create_directories(file / "full");
  EXPECT_EQ(fresh()->source, Source::kCompiled);
  EXPECT_EQ(fresh()->source, Source::kCompiled);
  for (const auto& entry : fs::directory_iterator(file.parent_path())) {
    const bool known = entry.path() == file || entry.path().filename() == "lock" || entry.path().extension() == ".json";
    EXPECT_TRUE(known) << entry.path() << " stays";
  }
}

TEST_F(Jit, AFolderThatCannotBeMadeBreaksNothing) {
  overwrite(folder_ / "cache", "a file");
  EXPECT_EQ(fresh()->source, Source::kCompiled);
  EXPECT_EQ(fresh()->source, Source::kCompiled);
  EXPECT_FALSE(Cache(options()).disk().usage().writable);
}

/// While it lives, the process has no special rights.
struct Unprivileged {
  Unprivileged() { become(65534); }
  ~Unprivileged() { become(0); }
  Unprivileged(const Unprivileged&) = delete;
  Unprivileged& operator=(const Unprivileged&) = delete;
  static void become(uid_t user) {
    const bool root = ::getuid() == 0;
    EXPECT_TRUE(!root || ::seteuid(user) == 0);
  }
};

TEST_F(Jit, AReadOnlyFolderIsReadAndNotWritten) {
  (void)fresh();
  KernelRequest another = kToy;
  another.unit = "another source";
  const auto set = [&](mode_t mode) {
    ::chmod(folder_.c_str(), mode);
    for (const auto& entry : fs::recursive_directory_iterator(folder_)) {
      if (entry.is_directory()) ::chmod(entry.path().c_str(), mode);
    }
  };
  set(0555);
  {
    const Unprivileged unprivileged;
    EXPECT_EQ(fresh()->source, Source::kDisk);
    EXPECT_EQ(fresh(another)->source, Source::kCompiled);
    EXPECT_EQ(fresh(another)->source, Source::kCompiled);
    EXPECT_FALSE(Cache(options()).disk().usage().writable);
  }
  set(0755);
  EXPECT_EQ(files(".cubin").size(), 1U);
}

/// Runs `work` in a process of its own and gives its exit code.
int in_child(const std::function<int()>& work) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(work());
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

TEST_F(Jit, AFullDiskBreaksNothingAndKeepsNoHalfFile) {
  const int code = in_child([&] {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{100, 100};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    return fresh()->source == Source::kCompiled && fresh()->source == Source::kCompiled ? 0 : 1;
  });
  EXPECT_EQ(code, 0);
  for (const auto& entry : fs::recursive_directory_iterator(folder_)) {
    EXPECT_TRUE(entry.is_directory() || entry.path().filename() == "lock") << entry.path();
  }
  EXPECT_EQ(fresh()->source, Source::kCompiled);
  EXPECT_EQ(fresh()->source, Source::kDisk);
}

TEST_F(Jit, TwoProcessesCompileTheSameKernelOnce) {
  const fs::path log = folder_ / "log";
  Cache::Options slow = options();
  slow.compiler.compile = [&log](const KernelRequest& request) {
    const int file = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    EXPECT_EQ(::write(file, "compiled\n", 9), 9);
    ::close(file);
    std::this_thread::sleep_for(200ms);
    return toy_binary(request);
  };
  std::vector<std::thread> parents;
  parents.reserve(4);
  std::atomic<int> good = 0;
  for (int i = 0; i < 4; ++i) {
    parents.emplace_back(
        [&] { good += in_child([&] { return Cache(slow).binary(kToy)->registers == 77 ? 0 : 1; }) == 0; });
  }
  for (std::thread& parent : parents) parent.join();
  EXPECT_EQ(good, 4);
  EXPECT_EQ(content(log), "compiled\n");
}

TEST_F(Jit, AProcessForkedMeanwhileDoesNotKeepTheLock) {
  const Disk disk(folder_ / "cache");
  std::unique_ptr<const FileLock> lock(new FileLock(disk.lock(80, content_key(kToy))));
  const pid_t child = ::fork();
  if (child == 0) ::pause(), ::_exit(0);
  lock.reset();
  const auto start = std::chrono::steady_clock::now();
  { const FileLock next = disk.lock(80, content_key(kToy)); }
  EXPECT_LT(std::chrono::steady_clock::now() - start, 10s);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST_F(Jit, ManyThreadsWaitForOneCompilation) {
  Cache::Options slow = options();
  slow.compiler.compile = [this](const KernelRequest& request) {
    ++compiled_;
    std::this_thread::sleep_for(50ms);
    return toy_binary(request);
  };
  Cache cache(slow);
  std::vector<std::shared_ptr<const Binary>> got(8);
  std::vector<std::thread> threads;
  threads.reserve(8);
  for (auto& binary : got) threads.emplace_back([&] { binary = cache.binary(kToy); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(compiled_, 1);
  for (const auto& binary : got) EXPECT_EQ(binary, got[0]);
}

TEST_F(Jit, DifferentKernelsCompileAtOnce) {
  constexpr int kThreads = 4;
  Cache::Options meeting = options();
  std::atomic<int> inside = 0, met = 0;
  meeting.compiler.compile = [&](const KernelRequest& request) {
    ++inside;  // and nobody leaves before all are there
    const auto give_up = std::chrono::steady_clock::now() + 20s;
    while (inside < kThreads && std::chrono::steady_clock::now() < give_up) std::this_thread::sleep_for(1ms);
    if (inside == kThreads) ++met;
    return toy_binary(request);
  };
  Cache cache(meeting);
  std::vector<std::thread> threads;
  threads.reserve(8);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&cache, i] { (void)cache.binary({"toy", "source " + std::to_string(i), 80}); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(met, kThreads);
}

TEST_F(Jit, AFailureIsForgotten) {
  Cache::Options failing = options();
  int tries = 0;
  failing.compiler.compile = [&](const KernelRequest& request) {
    if (++tries == 1) throw Error(ErrorCode::kOutOfMemory, "memory ran out");
    return toy_binary(request);
  };
  Cache cache(failing);
  EXPECT_EQ(words(ErrorCode::kOutOfMemory, [&] { (void)cache.binary(kToy); }), "memory ran out");
  EXPECT_EQ(cache.binary(kToy)->registers, 77);
}

// ---- packs and modes

TEST_F(Jit, APackServesWithoutACompiler) {
  const fs::path file = folder_ / "kernels.pack";
  KernelRequest another = kToy;
  another.unit = "another source";
  Pack::write(file, std::vector<Binary>{toy_binary(kToy), toy_binary(another), toy_binary(kToy)});
  EXPECT_EQ(Pack::open(file).size(), 2U);
  EXPECT_EQ(Pack::open(file).build(), build_id);
  for (const Mode mode : {Mode::kOn, Mode::kCache, Mode::kOff}) {
    Cache::Options with_pack = options(mode, "");
    with_pack.packs.push_back(file);
    Cache cache(with_pack);
    for (const KernelRequest& request : {kToy, another}) {
      EXPECT_EQ(cache.binary(request)->source, Source::kPack);
      EXPECT_EQ(cache.binary(request)->cubin, "cubin of " + request.unit);
    }
  }
  EXPECT_EQ(compiled_, 0);
}

TEST_F(Jit, ADamagedKernelInAPackIsCompiled) {
  const fs::path file = folder_ / "kernels.pack";
  Pack::write(file, std::vector<Binary>{toy_binary(kToy)});
  const std::string good = content(file);
  overwrite(file, good.substr(0, good.size() - 1));
  Cache::Options with_pack = options();
  with_pack.packs.push_back(file);
  EXPECT_EQ(Cache(with_pack).binary(kToy)->source, Source::kCompiled);
  with_pack.mode = Mode::kOff;
  EXPECT_TRUE(contains(words(ErrorCode::kUnsupported, [&] { (void)Cache(with_pack).binary(kToy); }),
                       "kernel toy for sm_80 is damaged in pack " + file.string() + ", and FOVEA_JIT=off forbids"));
}

TEST_F(Jit, APackThatIsNoneIsRefused) {
  const fs::path file = folder_ / "kernels.pack";
  const auto open = [&] { (void)Pack::open(file); };
  EXPECT_TRUE(contains(test::refusal(open), "kernels.pack cannot be read"));
  overwrite(file, "some other file");
  EXPECT_TRUE(contains(test::refusal(open), "is no pack"));
  Pack::write(file, std::vector<Binary>{toy_binary(kToy)});
  const std::string good = content(file);
  for (std::size_t i = 30; i < 170; i += 7) {  // count, checksum and index
    std::string damaged = good;
    damaged[i] = damaged[i] == 'f' ? '0' : 'f';
    overwrite(file, damaged);
    EXPECT_TRUE(contains(test::refusal(open), "pack " + file.string() + " is ")) << i;
  }
  overwrite(file, good.substr(0, 110));
  EXPECT_TRUE(contains(test::refusal(open), "is damaged; make it anew by fovea precompile"));
  EXPECT_TRUE(
      contains(words(ErrorCode::kDevice, [&] { Pack::write(folder_ / "no" / "folder", {}); }), "cannot be written"));
}

TEST_F(Jit, ModesSayWhatTheyForbid) {
  EXPECT_EQ(
      words(ErrorCode::kUnsupported, [&] { (void)Cache(options(Mode::kOff)).binary(kToy); }),
      "kernel toy for sm_80 is in no pack, and FOVEA_JIT=off forbids compiling it; set FOVEA_JIT=on, or make it by "
      "fovea precompile");
  EXPECT_TRUE(contains(words(ErrorCode::kUnsupported, [&] { (void)Cache(options(Mode::kCache)).binary(kToy); }),
                       "is in no pack and not in the cache, and FOVEA_JIT=cache forbids"));
  (void)fresh();
  EXPECT_EQ(Cache(options(Mode::kOff)).find(kToy), nullptr) << "off looks into packs alone";
  EXPECT_EQ(compiled_, 1);
}

TEST_F(Jit, WithoutACompilerSaysWhatItLacks) {
  EXPECT_EQ(words(ErrorCode::kDevice, [&] { (void)Cache(options(Mode::kOn, "")).binary(kToy); }),
            "there is no compiler");
}

/// Sets an environment variable for a while; null unsets it.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    set(value);
  }
  ~Variable() { set(before_ ? before_->c_str() : nullptr); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  void set(const char* value) const { value == nullptr ? ::unsetenv(name_) : ::setenv(name_, value, 1); }
  const char* name_;
  std::optional<std::string> before_;
};

TEST(JitEnvironment, ChoosesModeFolderAndPack) {
  const Variable mode("FOVEA_JIT", nullptr), own("FOVEA_CACHE_DIR", nullptr), pack("FOVEA_PACK", nullptr);
  const Variable base("XDG_CACHE_HOME", nullptr), home("HOME", "/home/me");
  EXPECT_EQ(Cache::options_of_environment().mode, Mode::kOn);
  EXPECT_EQ(Cache::options_of_environment().folder, "/home/me/.cache/fovea");
  {
    const Variable xdg("XDG_CACHE_HOME", "/var/caches"), off("FOVEA_JIT", "off"), named("FOVEA_PACK", "/a.pack");
    EXPECT_EQ(Cache::options_of_environment().folder, "/var/caches/fovea");
    EXPECT_EQ(Cache::options_of_environment().mode, Mode::kOff);
    EXPECT_EQ(Cache::options_of_environment().packs, std::vector<fs::path>{"/a.pack"});
    const Variable mine("FOVEA_CACHE_DIR", "/mine");
    EXPECT_EQ(Cache::options_of_environment().folder, "/mine");
  }
  const Variable relative("XDG_CACHE_HOME", "caches"), homeless("HOME", nullptr);
  EXPECT_EQ(Cache::options_of_environment().folder, "");
  const Variable wrong("FOVEA_JIT", "yes");
  EXPECT_EQ(test::refusal([] { (void)Cache::options_of_environment(); }), "FOVEA_JIT ('yes') must be on, cache or off");
}

// ---- NVRTC

class WithNvrtc : public Jit {
 protected:
  void SetUp() override {
    if (Nvrtc::find() == nullptr) GTEST_SKIP() << Nvrtc::why_none();
    Jit::SetUp();
  }
  [[nodiscard]] Cache::Options options() {
    return {.mode = Mode::kOn, .folder = folder_ / "cache", .packs = {}, .compiler = nvrtc(folder_ / "cache")};
  }

  /// A kernel that asks the rules of src/math.
  static KernelRequest real(const std::string& body = "params.x[threadIdx.x] = s[threadIdx.x ^ 1];") {
    return {
        "real",
        "#include \"math/band.h\"\n#include \"math/philox.h\"\nstruct Params { float* x; };\n"
        "extern \"C\" __global__ __launch_bounds__(64) void fovea_kernel(const __grid_constant__ Params params) {\n"
        "  __shared__ float s[64];\n  s[threadIdx.x] = fovea::math::patch_of(threadIdx.x);\n  __syncthreads();\n  " +
            body + "\n}\n",
        80};
  }
};

TEST_F(WithNvrtc, CompilesTheEmbeddedTextForEveryArchitecture) {
  for (const int arch : {75, 80, 86, 89, 90, 100, 120}) {
    if (!Nvrtc::find()->knows(arch)) continue;
    KernelRequest request = real();
    request.arch = arch;
    const Binary binary = nvrtc().compile(request);
    EXPECT_TRUE(
        binary.cubin.starts_with("\x7f"
                                 "ELF"));
    EXPECT_GT(binary.registers, 0);
    EXPECT_EQ(binary.shared_bytes % 1024, 256) << "some architectures keep 1 KiB for themselves";
    EXPECT_EQ(binary.spill_bytes + binary.local_bytes, 0);
    EXPECT_EQ(binary.warnings, "");
    EXPECT_GT(binary.seconds, 0);
  }
}

TEST_F(WithNvrtc, DoesNotReadTheDisk) {
  fs::create_directories(folder_ / "math");
  overwrite(folder_ / "math" / "band.h", "#error not this one\n");
  const fs::path before = fs::current_path();
  fs::current_path(folder_);
  EXPECT_NO_THROW((void)nvrtc().compile(real()));
  fs::current_path(before);
}

TEST_F(WithNvrtc, AnErrorHasTheFirstFaultAndTheSource) {
  const KernelRequest request = real("no_such_thing = 1;\n  nor_this = 2;");
  const std::string text = words(ErrorCode::kInternal, [&] { (void)Cache(options()).binary(request); });
  EXPECT_TRUE(contains(text, "kernel real did not compile for sm_80 with NVRTC "));
  EXPECT_TRUE(contains(text, "real.cu(8): error: identifier \"no_such_thing\" is undefined"));
  EXPECT_FALSE(contains(text, "nor_this")) << text;
  const std::string before = "its source and the whole log are in ";
  ASSERT_TRUE(contains(text, before));
  const fs::path file = text.substr(text.find(before) + before.size());
  EXPECT_TRUE(content(file).starts_with(request.unit));
  EXPECT_TRUE(contains(content(file), "identifier \"nor_this\" is undefined"));
  fs::remove(file);
  EXPECT_TRUE(files(".cubin").empty());
}

TEST_F(WithNvrtc, TheAssemblersErrorsAreErrorsToo) {
  const std::string text = words(ErrorCode::kInternal, [&] {
    (void)nvrtc().compile(
        real("__shared__ float big[99999]; big[threadIdx.x] = 1; __syncthreads(); params.x[0] = big[7];"));
  });
  EXPECT_TRUE(contains(text, "uses too much shared data"));
  fs::remove(text.substr(text.find("are in ") + 7));
}

TEST_F(WithNvrtc, AnArchitectureItDoesNotKnowIsNamed) {
  KernelRequest request = real();
  request.arch = 35;
  EXPECT_TRUE(contains(words(ErrorCode::kUnsupported, [&] { (void)nvrtc().compile(request); }),
                       "does not compile for sm_35; name another one in FOVEA_NVRTC"));
}

TEST_F(WithNvrtc, SpillsAreSeen) {
  const Binary binary = nvrtc().compile(
      {"spills",
       "extern \"C\" __global__ __launch_bounds__(1024, 2) void fovea_kernel(float* x) {\n  float a[64];\n"
       "#pragma unroll\n  for (int i = 0; i < 64; ++i) a[i] = x[threadIdx.x * 64 + i];\n  __syncthreads();\n"
       "#pragma unroll\n  for (int i = 0; i < 64; ++i) x[threadIdx.x * 64 + i] = a[63 - i] * a[i * 7 % 64];\n}\n",
       80});
  EXPECT_GT(binary.spill_bytes, 0);
  EXPECT_EQ(binary.registers, 32);
}

TEST_F(WithNvrtc, ThreadsCompileSideBySide) {
  Cache cache(options());
  std::vector<std::thread> threads;
  threads.reserve(8);
  std::atomic<int> good = 0;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] {
      const std::string body = "params.x[threadIdx.x] = s[threadIdx.x ^ " + std::to_string(1 + i % 3) + "];";
      good += cache.binary(real(body))->registers > 0 ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 6);
  EXPECT_EQ(files(".cubin").size(), 3U);
}

TEST_F(WithNvrtc, ItsVersionIsRememberedAndAWrongMemoryHarmless) {
  (void)Cache(options()).binary(real());
  const fs::path memo = folder_ / "cache" / "nvrtc";
  const std::string good = content(memo);
  EXPECT_TRUE(good.starts_with("NVRTC " + Nvrtc::find()->version() + "\n" + Nvrtc::find()->path() + "\n"));
  overwrite(memo, "NVRTC 99.9" + good.substr(good.find('\n')));
  EXPECT_EQ(Cache(options()).find(real()), nullptr) << "NVRTC is not asked";
  EXPECT_EQ(Cache(options()).binary(real())->source, Source::kDisk) << "but before one compiles anew";
  EXPECT_EQ(content(memo), good);
  for (const std::string& wrong :
       {std::string("NVRTC 99.9"), "NVRTC 99.9" + good.substr(good.find('\n')) + "x", std::string()}) {
    overwrite(memo, wrong);
    EXPECT_NE(Cache(options()).find(real()), nullptr);
    EXPECT_EQ(content(memo), good);
  }
}

TEST_F(WithNvrtc, WhatNamesItIsReadOnce) {
  const auto note = [this] {
    fs::remove_all(folder_ / "cache");
    (void)Cache(options()).binary(real());
    return content(folder_ / "cache" / "nvrtc");
  };
  const std::string before = note();
  const Variable later("FOVEA_NVRTC", "/another/libnvrtc.so");
  EXPECT_EQ(note(), before) << "the NVRTC found before stays in use";
}

TEST_F(WithNvrtc, ACachedKernelIsThereInFiveMilliseconds) {
  (void)Cache(options()).binary(real());
  double best = 1;
  for (int i = 0; i < 5; ++i) {
    const auto start = std::chrono::steady_clock::now();
    EXPECT_EQ(Cache(options()).binary(real())->source, Source::kDisk);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  RecordProperty("milliseconds", std::to_string(best * 1e3));
  EXPECT_LT(best, 5e-3);
}

}  // namespace
}  // namespace fovea::cuda::jit
