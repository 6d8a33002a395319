// The CPU and the GPU drop the same entries.
#include <cmath>

#include "cpu/elements.h"
#include "tests/gpu/support.h"

namespace fovea::test {
namespace {

/// All scores alike and an identity for v: element e of out's row i shows whether entry (i, e) was kept.  With an
/// identity for dout too, element e of dv's row j shows whether entry (e, j) was.
void make_transparent(tools::Workload& work) {
  const Inputs& in = work.inputs();
  cpu::for_each_element(in.q, [&](std::int64_t, std::int64_t offset) { cpu::store(in.q, offset, 0.0); });
  const auto fill_identity = [](const Tensor& t, const Tensor& starts) {
    if (!t.defined()) return;
    const std::int64_t columns = t.shape[t.rank - 1], heads = t.shape[t.rank - 2], rows = t.shape[t.rank - 3];
    cpu::for_each_element(t, [&](std::int64_t index, std::int64_t offset) {
      const std::int64_t column = index % columns, row = index / columns / heads % rows;
      std::int64_t start = 0;  // of the row's sequence
      for (std::int64_t b = 0; starts.defined() && b < starts.shape[0]; ++b) {
        const auto begin = static_cast<std::int64_t>(cpu::load(starts, b));
        if (begin <= row) start = begin;
      }
      cpu::store(t, offset, row - start == column ? 1.0 : 0.0);
    });
  };
  fill_identity(in.v, in.cu_seqlens_kv);
  fill_identity(in.dout, in.cu_seqlens_q);
}

/// Which entries show in a result, one char an element.
std::string kept(const Tensor& result) {
  std::string text;
  for (const double x : cpu::load_all(result)) text += x != 0.0 ? '1' : '0';
  return text;
}

class DropoutBits : public OnGpu, public ::testing::WithParamInterface<const char*> {};

TEST_P(DropoutBits, AreThoseOfTheCpu) {
  const std::string line = GetParam();
  const auto run = [&](const Device& device) {
    Task task(line, device);
    make_transparent(task.work());
    (void)task.run();
    const Outputs& out = task.work().outputs();
    return std::pair(kept(out.out), out.dv.defined() ? kept(out.dv) : "");
  };
  const auto [cpu_out, cpu_dv] = run(Device{});
  const auto [gpu_out, gpu_dv] = run(kGpu);
  EXPECT_NE(cpu_out.find('1'), std::string::npos);
  EXPECT_NE(cpu_out.find('0'), std::string::npos);
  EXPECT_EQ(gpu_out, cpu_out);
  EXPECT_EQ(gpu_dv, cpu_dv);
}

INSTANTIATE_TEST_SUITE_P(
    Lines, DropoutBits,
    ::testing::Values("fwd+bwd fp32 b2 hq3 sq200 skv300 d32 dv300 dropout=0.3 seed=9 offset=4",
                      "fwd+bwd bf16 b2 hq2 sq257 skv255 d64 dv257 dropout=0.5 seed=123456789012345 offset=42",
                      "fwd+bwd fp16 b1 hq2 sq130 d128 dv130 dropout=0.1 causal=bottom_right",
                      "fwd+bwd bf16 hq2 d64 dv200 packed_q=70+1+200 packed_kv=200+33+150 dropout=0.2 seed=1",
                      "fwd bf16 b1 hq4 hkv1 sq3 skv512 d64 dv512 dropout=0.4 seed=2"));

}  // namespace
}  // namespace fovea::test
