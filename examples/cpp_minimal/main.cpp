// Causal attention with dropout over random tensors, and who ran it.
#include <fovea/fovea.h>

#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace {

std::vector<float> random_values(std::int64_t count, std::uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace

int main() {
  constexpr std::int64_t batch = 2, seqlen = 512, num_q_heads = 8, num_kv_heads = 2, head_dim = 64;
  std::vector<float> q_values = random_values(batch * seqlen * num_q_heads * head_dim, 1);
  std::vector<float> k_values = random_values(batch * seqlen * num_kv_heads * head_dim, 2);
  std::vector<float> v_values = random_values(batch * seqlen * num_kv_heads * head_dim, 3);
  std::vector<float> out_values(q_values.size());

  using fovea::Tensor;
  constexpr auto fp32 = fovea::DType::kFloat32;
  const Tensor q = Tensor::contiguous(q_values.data(), fp32, {batch, seqlen, num_q_heads, head_dim});
  const Tensor k = Tensor::contiguous(k_values.data(), fp32, {batch, seqlen, num_kv_heads, head_dim});
  const Tensor v = Tensor::contiguous(v_values.data(), fp32, {batch, seqlen, num_kv_heads, head_dim});
  const Tensor out = Tensor::contiguous(out_values.data(), fp32, {batch, seqlen, num_q_heads, head_dim});

  fovea::AttentionOptions options;
  options.causal = fovea::Causal::kBottomRight;
  options.dropout = {.probability = 0.1F, .seed = 42};

  try {
    // One call that owns its workspace ...
    fovea::attention_forward(q, k, v, options, out);

    // ... or a plan, made once and executed as often as wanted; it tells who runs it and why the others do not.
    const fovea::Plan plan = fovea::plan_forward(fovea::describe(fovea::Direction::kForward, q, k, v, options));
    plan.execute({.q = q, .k = k, .v = v}, {.out = out});
    std::printf("%s\nout[0][0][0][0..3] = %g %g %g %g\n", to_string(plan.report()).c_str(), out_values[0],
                out_values[1], out_values[2], out_values[3]);
  } catch (const fovea::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
