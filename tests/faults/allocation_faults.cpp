// Every allocation of a call is made to fail, one after another: the call says so and writes nothing, or does without.
// An executable of its own, because it replaces operator new for the whole process.
#include <fovea/c.h>
#include <fovea/fovea.h>
#include <fovea/nn/transformer.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>

#include "tests/bytes.h"
#include "tools/workload.h"

namespace {

std::atomic<std::int64_t> allocations_left{-1};  // below 0: none fails; at 0 the next one does

void* allocate(std::size_t size, std::size_t alignment) noexcept {
  if (allocations_left.load() >= 0 && allocations_left.fetch_sub(1) == 0) return nullptr;
  return std::aligned_alloc(alignment, (size + alignment) / alignment * alignment);
}

void* allocate_or_throw(std::size_t size, std::size_t alignment) {
  void* const memory = allocate(size, alignment);
  return memory != nullptr ? memory : throw std::bad_alloc();
}

/// Never inlined, or g++ finds memory of `operator new` given to std::free.
[[gnu::noinline]] void release(void* p) { std::free(p); }

constexpr std::size_t kPlain = __STDCPP_DEFAULT_NEW_ALIGNMENT__;
constexpr std::size_t bytes(std::align_val_t alignment) { return static_cast<std::size_t>(alignment); }

}  // namespace

void* operator new(std::size_t n) { return allocate_or_throw(n, kPlain); }
void* operator new[](std::size_t n) { return allocate_or_throw(n, kPlain); }
void* operator new(std::size_t n, std::align_val_t a) { return allocate_or_throw(n, bytes(a)); }
void* operator new[](std::size_t n, std::align_val_t a) { return allocate_or_throw(n, bytes(a)); }
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, kPlain); }
void* operator new[](std::size_t n, const std::nothrow_t&) noexcept { return allocate(n, kPlain); }
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept { return allocate(n, bytes(a)); }
void* operator new[](std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
  return allocate(n, bytes(a));
}
void operator delete(void* p) noexcept { release(p); }
void operator delete[](void* p) noexcept { release(p); }
void operator delete(void* p, std::size_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t) noexcept { release(p); }
void operator delete(void* p, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::align_val_t) noexcept { release(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { release(p); }
void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { release(p); }

namespace fovea {
namespace {

/// The n-th allocation of each call fails, for n = 0, 1, 2, ... until a call needs no more.  `call` returns whether it
/// was told that memory ran out; `before` it and `after` it, which is told so too, all allocations succeed.
template <typename Call, typename After>
void fail_each_allocation(const std::function<void()>& before, const Call& call, const After& after) {
  constexpr int kMost = 20000;
  int told = 0;
  for (int n = 0; n < kMost; ++n) {
    before();
    allocations_left = n;
    const bool ran_out = call();
    const bool failed = allocations_left.exchange(-1) < 0;
    after(ran_out);
    told += ran_out ? 1 : 0;
    if (!failed) {
      EXPECT_FALSE(ran_out) << "no allocation failed, and still memory ran out";
      EXPECT_GT(told, 0) << "the call never said that memory ran out";
      return;
    }
  }
  ADD_FAILURE() << "still allocating after " << kMost;
}

/// A C++ call; any exception but Error(kOutOfMemory) ends the test.
template <typename Call>
bool runs_out(const Call& call) {
  try {
    call();
    return false;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory) << error.what();
    return true;
  }
}

class AllocationFault : public testing::TestWithParam<const char*> {
 protected:
  Problem problem = parse_problem(GetParam());
  tools::Workload data{problem, 1};
};

INSTANTIATE_TEST_SUITE_P(
    Problems, AllocationFault,
    testing::Values("fwd+bwd fp32 b2 hq4 hkv2 sq70 d64",
                    "fwd+bwd bf16 b1 hq2 sq40 skv300 d72 dv40 causal=bottom_right window=30,- mask=b1qk bias=1hqk "
                    "alibi sink softcap=20 dropout=0.2 seed=3",
                    "fwd+bwd fp16 hq2 d32 packed_q=5+0+70 packed_kv=9+3+64 deterministic"));

TEST_P(AllocationFault, IsReportedByPlansAndNothingIsWritten) {
  const auto forward = [&] { plan_forward(data.problem()).execute(data.inputs(), data.outputs()); };
  const auto backward = [&] { plan_backward(data.problem()).execute(data.inputs(), data.outputs()); };
  data.poison_outputs();
  const std::vector<char> no_out = tests::bytes_of(data.outputs().out);
  const std::vector<char> no_dq = tests::bytes_of(data.outputs().dq);
  forward();
  const std::vector<char> out = tests::bytes_of(data.outputs().out);

  fail_each_allocation([&] { data.poison_outputs(); }, [&] { return runs_out(forward); },
                       [&](bool told) { EXPECT_EQ(tests::bytes_of(data.outputs().out), told ? no_out : out); });
  fail_each_allocation(
      [&] {
        data.poison_outputs();
        forward();  // the backward reads out and lse
      },
      [&] { return runs_out(backward); },
      [&](bool told) { EXPECT_EQ(tests::bytes_of(data.outputs().dq) == no_dq, told); });
}

TEST_P(AllocationFault, IsReportedByExplain) {
  fail_each_allocation([] {}, [&] { return runs_out([&] { (void)explain(data.problem()); }); }, [](bool) {});
}

TEST_P(AllocationFault, IsAStatusAtTheCDoor) {
  problem.direction = Direction::kForward;
  const std::string line = to_string(problem);
  fovea_status status = FOVEA_OK;
  fovea_plan* plan = nullptr;
  fail_each_allocation([] {},
                       [&] {
                         status = fovea_plan_from_line(line.c_str(), nullptr, nullptr, &plan);
                         return status == FOVEA_OUT_OF_MEMORY;
                       },
                       [&](bool told) {
                         EXPECT_TRUE(told || status == FOVEA_OK) << fovea_last_error();
                         EXPECT_EQ(status == FOVEA_OK, plan != nullptr);
                         EXPECT_TRUE(!told || *fovea_last_error() != '\0');
                         fovea_plan_destroy(plan);
                       });
}

TEST(WorkspaceFault, NamesTheSizeThatCouldNotBeHad) {
  tools::Workload data(parse_problem("fwd fp32 b1 hq2 sq64 d64"), 1);
  const Plan plan = plan_forward(data.problem());
  ASSERT_GT(plan.workspace_bytes(), 0U);
  allocations_left = 0;
  try {
    plan.execute(data.inputs(), data.outputs());
    ADD_FAILURE() << "executed without a workspace";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
    EXPECT_NE(std::string(error.what()).find(std::to_string(plan.workspace_bytes())), std::string::npos);
  }
  allocations_left = -1;
}

#ifdef FOVEA_LAYERS
TEST(ArrayFault, IsReportedAndLeavesTheBytesHeldAsTheyWere) {
  const nn::Array another(DType::kFloat32, {10});
  (void)nn::peak_bytes({}, true);
  fail_each_allocation(
      [] {}, [] { return runs_out([] { const nn::Array a(DType::kFloat32, {1000}); }); },
      [&](bool told) { EXPECT_EQ(nn::peak_bytes({}, true), another.size_bytes() + (told ? 0 : 4000)); });
}

TEST(LayerFault, IsReportedByStacksAndTheirParameters) {
  const nn::TransformerEncoder::Options options{
      .layer = {.d_model = 8, .nhead = 2, .dim_feedforward = 8}, .num_layers = 2, .norm = true};
  const auto each = [](const auto& call) { fail_each_allocation([] {}, [&] { return runs_out(call); }, [](bool) {}); };
  each([&] { const nn::TransformerEncoder made(options); });
  nn::TransformerEncoder stack(options);
  each([&] { (void)nn::parameters(stack); });
  each([&] { nn::zero_gradients(stack); });
}
#endif

}  // namespace
}  // namespace fovea
