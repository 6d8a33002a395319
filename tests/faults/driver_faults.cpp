// The library and NVIDIA's driver, where that is a fake one (fake_driver.cpp): contexts, launches, and every sentence
// about what fails.
#include <dlfcn.h>
#include <fovea/error.h>
#include <fovea/plan.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <memory>

#include "cuda/driver.h"
#include "cuda/jit/cache.h"
#include "cuda/nvrtc.h"
#include "fake_driver.h"
#include "tests/support.h"

namespace fovea::cuda {
namespace {

using test::contains;
using test::words;

/// Null where the tests run without ctest, which puts the fake driver first.
FakeDriver* fake_or_null() {
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW);
  return library == nullptr ? nullptr : static_cast<FakeDriver*>(::dlsym(library, "fake_driver"));
}
FakeDriver& fake() { return *fake_or_null(); }

class DriverTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (fake_or_null() == nullptr) GTEST_SKIP() << "run it by ctest, which puts the fake driver first";
  }
  void TearDown() override {
    if (fake_or_null() == nullptr) return;
    fake().faults.clear();
    fake().refused = FakeDriver().refused;
    EXPECT_TRUE(fake().contexts.empty()) << "a context stays current";
  }
};

/// Says in a process of its own, where the driver has not been opened yet, why there is none.
[[noreturn]] void say_why_no_driver(const std::function<void()>& prepare) {
  prepare();
  std::cerr << "[" << why_no_driver() << "] " << driver_version() << " " << gpu_count();
  std::exit(0);
}

TEST(DriverStartDeathTest, SaysWhyThereIsNoGpu) {
  if (fake_or_null() == nullptr) GTEST_SKIP() << "run it by ctest, which puts the fake driver first";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto exited = ::testing::ExitedWithCode(0);
  EXPECT_EXIT(say_why_no_driver([] { fake().faults["cuInit"] = 100; }), exited,
              "\\[the NVIDIA driver does not start: cuInit says something else \\(CUDA_ERROR_OTHER\\)\\] 13000 0");
  for (const std::string function : {"cuDeviceGetCount", "cuDeviceGetAttribute"}) {
    EXPECT_EXIT(say_why_no_driver([&] { fake().faults[function] = 101; }), exited,
                "\\[the NVIDIA driver does not start: " + function + " says something else .* 13000 0");
  }
  EXPECT_EXIT(say_why_no_driver([] { fake().gpus = 0; }), exited, "\\[the NVIDIA driver sees no GPU\\] 13000 0");
  EXPECT_EXIT(say_why_no_driver([] {}), exited, "\\[\\] 13000 2");
}

/// A process must not fork once the driver has started.
TEST(DriverStartDeathTest, AnArchitectureIsPlannedForWithoutIt) {
  if (fake_or_null() == nullptr) GTEST_SKIP() << "run it by ctest, which puts the fake driver first";
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto plan = [] {
    ::setenv("FOVEA_JIT", "off", 1);  // here the stack is too small for a compiler
    const Report report = explain(parse_problem("fwd bf16 b1 hq2 sq300 d64"), {DeviceKind::kCuda, 0, 90});
    (void)jit::nvrtc().name(true);
    std::cerr << "[" << report.backend << "] " << driver_version() << " " << fake().started;
    std::exit(0);
  };
  EXPECT_EXIT(plan(), ::testing::ExitedWithCode(0), "\\[cuda_hopper\\] 13000 0");
}

TEST(NvrtcDeathTest, SaysWhatFailsInTheOneThatIsNamed) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto say_why = [] {
    ::setenv("FOVEA_NVRTC", FOVEA_FAILING_NVRTC, 1);
    std::cerr << Nvrtc::why_none();
    std::exit(0);
  };
  EXPECT_EXIT(say_why(), ::testing::ExitedWithCode(0),
              "which fails at nvrtcVersion: NVRTC_ERROR_OUT_OF_MEMORY; name an NVRTC of 12.4 or later");
}

TEST_F(DriverTest, TellsOfEveryGpu) {
  EXPECT_EQ(why_no_driver(), "");
  EXPECT_EQ(gpu_count(), 2);
  EXPECT_EQ(gpu(0).name, "Fake A");
  EXPECT_EQ(gpu(0).compute_capability, 90);
  EXPECT_EQ(gpu(1).compute_capability, 75);
  EXPECT_EQ(gpu(0).shared_bytes_per_block, 100'000);
  EXPECT_EQ(test::refusal([] { (void)gpu(2); }), "cuda:2 is not there; this machine's last GPU is cuda:1");
  EXPECT_EQ(test::refusal([] { const CurrentGpu current(-1); }),
            "cuda:-1 is not there; this machine's last GPU is cuda:1");
}

TEST_F(DriverTest, ACallersContextIsCurrentAgain) {
  int caller = 0;
  fake().contexts.push_back(&caller);
  {
    const CurrentGpu one(1);
    EXPECT_EQ(fake().contexts.size(), 2U);
    const CurrentGpu zero(0);
    EXPECT_NE(fake().contexts[1], fake().contexts[2]);
  }
  EXPECT_THROW(DeviceMemory(7, 10), Error);
  EXPECT_EQ(fake().contexts, std::vector<void*>{&caller});
  fake().contexts.clear();
}

TEST_F(DriverTest, APrimaryContextIsRetainedOnce) {
  { const CurrentGpu first(0), second(0); }
  const std::size_t retained = fake().retained.size();
  { const CurrentGpu third(0); }
  EXPECT_EQ(fake().retained.size(), retained);
  EXPECT_LE(std::ranges::count(fake().retained, fake().retained[0]), 1);
}

TEST_F(DriverTest, MemoryComesAndGoes) {
  const std::size_t before = fake().allocations - fake().frees;
  {
    const DeviceMemory memory(0, 16), nothing(0, 0);
    EXPECT_EQ(nothing.data(), nullptr);
    fill_async(0, memory.data(), 7, 16, nullptr);
    std::array<unsigned char, 4> bytes{};
    copy_async(0, bytes.data(), memory.data(), 4, nullptr);
    EXPECT_EQ(bytes[3], 7);
    DeviceMemory moved(0, 8);
    moved = DeviceMemory(0, 24);
    EXPECT_EQ(moved.bytes(), 24U);
  }
  EXPECT_EQ(fake().allocations - fake().frees, before);
  fake().faults["cuMemAlloc_v2"] = 2;
  EXPECT_EQ(words(ErrorCode::kOutOfMemory, [] { DeviceMemory(1, 1000); }),
            "cuMemAlloc of 1000 bytes failed on cuda:1: the driver says out of memory (CUDA_ERROR_OUT_OF_MEMORY)");
}

TEST_F(DriverTest, AFaultOfAKernelShowsWhereOneWaits) {
  fake().faults["cuStreamSynchronize"] = fake().faults["cuCtxSynchronize"] = 700;
  EXPECT_TRUE(
      contains(words(ErrorCode::kDevice, [] { Stream(0).synchronize(); }), "cuStreamSynchronize failed on cuda:0"));
  EXPECT_TRUE(contains(words(ErrorCode::kDevice, [] { synchronize(1); }), "cuCtxSynchronize failed on cuda:1"));
}

TEST_F(DriverTest, EventsAndGraphs) {
  const Stream stream(0);
  const Event start(0), end(0);
  start.record(stream.get());
  end.record(stream.get());
  EXPECT_EQ(end.seconds_since(start), 0.25);
  int worked = 0;
  Graph(0, stream, [&] { ++worked; }).launch(stream);
  EXPECT_EQ(worked, 1);
  const std::size_t frees = fake().frees;
  EXPECT_THROW(Graph(0, stream, [] { throw std::logic_error("in the capture"); }), std::logic_error);
  EXPECT_EQ(fake().frees, frees + 1) << "what was captured till then is given back";
}

// ---- kernels

struct Params {
  int first = 0;
  double rest[20] = {};
};

const jit::KernelRequest kRequest{.name = "toy", .unit = "a toy's source", .arch = 90};

class KernelTest : public DriverTest {
 protected:
  static jit::Cache::Options options() {
    const auto compile = [](const jit::KernelRequest& request) {
      jit::Binary binary;
      binary.key = content_key(request);
      binary.name = request.name;
      binary.arch = request.arch;
      binary.compiler = "Toy 9.0";
      return binary;
    };
    return {.mode = jit::Mode::kOn, .folder = {}, .packs = {}, .compiler = {[](bool) { return "Toy 9.0"; }, compile}};
  }
};

TEST_F(KernelTest, LoadsOnceForEachGpu) {
  jit::Cache cache(options());
  const int before = fake().loaded;
  const jit::Kernel& first = cache.load(kRequest, 0);
  EXPECT_EQ(&cache.load(kRequest, 0), &first);
  EXPECT_NE(&cache.load(kRequest, 1), &first);
  EXPECT_EQ(fake().loaded, before + 2);
  EXPECT_EQ(fake().allowed_shared_bytes, 100'000 - 1024) << "all that the GPU has, but what is static";
}

TEST_F(KernelTest, LaunchesWithWhatItIsGiven) {
  jit::Cache cache(options());
  const jit::Kernel& kernel = cache.load(kRequest, 1);
  kernel.launch({.x = 3, .y = 4, .z = 5, .threads = 256, .shared_bytes = 7000}, Params{.first = 42}, nullptr);
  EXPECT_EQ(fake().launch, (std::vector<unsigned>{3, 4, 5, 256, 1, 1, 7000}));
  EXPECT_EQ(fake().launched_with, 42);
  EXPECT_EQ(fake().launch_contexts.size(), 1U);
  EXPECT_EQ(fake().early_launches, 0);
  kernel.launch({.x = 7, .threads = 32, .threads_y = 4, .early = true}, Params{.first = 43}, nullptr);
  EXPECT_EQ(fake().early_launches, 1);
  EXPECT_EQ(fake().launch, (std::vector<unsigned>{7, 1, 1, 32, 4, 1, 0}));
  EXPECT_EQ(fake().launched_with, 43);
  fake().faults["cuLaunchKernel"] = 701;
  EXPECT_EQ(
      words(ErrorCode::kDevice, [&] { kernel.launch({.x = 2, .threads = 64}, Params{}, nullptr); }),
      "cuLaunchKernel of toy with 2 × 1 × 1 blocks of 64 threads and 0 dynamic shared bytes failed on cuda:1: the "
      "driver says something else (CUDA_ERROR_OTHER)");
  EXPECT_TRUE(contains(
      words(ErrorCode::kDevice, [&] { kernel.launch({.x = 2, .threads = 64, .early = true}, Params{}, nullptr); }),
      "cuLaunchKernelEx of toy with 2 × 1 × 1 blocks"));
}

TEST_F(KernelTest, ADriverOlderThanTheCompilerIsNamed) {
  jit::Cache cache(options());
  fake().faults["cuModuleLoadData"] = 209;
  EXPECT_EQ(
      words(ErrorCode::kDevice, [&] { (void)cache.load(kRequest, 0); }),
      "the driver (CUDA 13.0) of cuda:0 refuses kernel toy made by Toy 9.0 (compiled): no kernel image is available "
      "(CUDA_ERROR_NO_BINARY_FOR_GPU); update the driver, or use an NVRTC no newer than it (FOVEA_NVRTC), for packs "
      "too");
  fake().faults.clear();
  EXPECT_NO_THROW((void)cache.load(kRequest, 0)) << "and tried again when asked again";
}

TEST_F(KernelTest, AStoredKernelThatTheDriverRefusesIsMadeAnew) {
  std::string name = ::testing::TempDir() + "fovea-refused-XXXXXX";
  ASSERT_NE(::mkdtemp(name.data()), nullptr);
  const std::filesystem::path folder = name, pack = folder / "newer.pack";
  jit::Binary newer = options().compiler.compile(kRequest);
  newer.compiler = "Toy 10.0";
  newer.cubin = "too new";
  jit::Pack::write(pack, std::vector<jit::Binary>{newer});
  jit::Cache::Options stored = options();
  stored.folder = folder;
  stored.packs.push_back(pack);
  const auto source = [&] { return jit::Cache(stored).load(kRequest, 0).binary().source; };
  EXPECT_EQ(source(), jit::Source::kPack);
  fake().refused = "too new";
  EXPECT_EQ(source(), jit::Source::kCompiled);
  EXPECT_EQ(source(), jit::Source::kDisk) << "once for all processes";

  const auto sentence = [&](ErrorCode code) { return words(code, [&] { (void)source(); }); };
  const std::string refusal =
      "the driver (CUDA 13.0) of cuda:0 refuses kernel toy made by Toy 10.0 (pack): no kernel image is available "
      "(CUDA_ERROR_NO_BINARY_FOR_GPU); update the driver, or use an NVRTC no newer than it (FOVEA_NVRTC), for packs "
      "too";
  stored.folder.clear();
  stored.compiler.compile = [](const jit::KernelRequest&) -> jit::Binary {
    throw Error(ErrorCode::kUnsupported, "Toy 9.0 does not compile for sm_90");
  };
  EXPECT_EQ(sentence(ErrorCode::kUnsupported),
            refusal + "; and one compiled here does not serve: Toy 9.0 does not compile for sm_90");
  stored.mode = jit::Mode::kCache;
  EXPECT_EQ(sentence(ErrorCode::kDevice), refusal) << "nobody may compile";
  stored.mode = jit::Mode::kOn;
  stored.compiler.name = [](bool) { return "Toy 10.0"; };
  EXPECT_EQ(sentence(ErrorCode::kDevice), refusal) << "the same compiler would make the same";
  std::filesystem::remove_all(folder);
}

TEST_F(KernelTest, OfSeveralStoredKernelsTheDriverIsAskedForEach) {
  std::string name = ::testing::TempDir() + "fovea-several-XXXXXX";
  ASSERT_NE(::mkdtemp(name.data()), nullptr);
  const std::filesystem::path folder = name, pack = folder / "newest.pack";
  jit::Binary made = options().compiler.compile(kRequest);
  for (const char* compiler : {"Toy 9.1", "Toy 9.2", "Toy 9.3"}) {
    made.compiler = compiler;
    made.cubin = compiler == std::string("Toy 9.1") ? "old enough" : "too new";
    jit::Disk(folder).store(made);
  }
  made.compiler = "Toy 10.0";
  jit::Pack::write(pack, std::vector<jit::Binary>{made});
  jit::Cache::Options stored = options();
  stored.folder = folder;
  const auto compiler = [&] { return jit::Cache(stored).load(kRequest, 0).binary().compiler; };
  stored.mode = jit::Mode::kCache;
  EXPECT_EQ(compiler(), "Toy 9.3");
  fake().refused = "too new";
  EXPECT_EQ(compiler(), "Toy 9.1");
  stored.packs.push_back(pack);
  EXPECT_EQ(compiler(), "Toy 9.1") << "behind a pack, too";
  stored.mode = jit::Mode::kOff;
  EXPECT_TRUE(contains(words(ErrorCode::kDevice, [&] { (void)compiler(); }), "made by Toy 10.0 (pack)"));
  stored.mode = jit::Mode::kOn;
  stored.compiler.name = [](bool) { return ""; };
  stored.compiler.compile = [](const jit::KernelRequest&) -> jit::Binary {
    throw Error(ErrorCode::kDevice, "there is no compiler");
  };
  EXPECT_EQ(compiler(), "Toy 9.1");
  fake().refused = "";
  stored.packs.clear();
  const std::string sentence = words(ErrorCode::kDevice, [&] { (void)compiler(); });
  EXPECT_TRUE(contains(sentence, "made by Toy 9.3 (disk)"));
  EXPECT_TRUE(contains(sentence, "does not serve: there is no compiler"));
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace fovea::cuda
