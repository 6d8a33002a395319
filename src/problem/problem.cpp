#include <fovea/problem.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace fovea {
namespace {

struct DTypeFacts {
  const char* name;
  std::int64_t bytes;
};
constexpr DTypeFacts kDTypes[] = {{"fp32", 4}, {"fp16", 2}, {"bf16", 2}, {"bool", 1}, {"int32", 4}, {"?", 0}};

const DTypeFacts& facts(DType dtype) noexcept {
  return kDTypes[std::min(static_cast<std::size_t>(dtype), std::size(kDTypes) - 1)];
}

}  // namespace

const char* name(DType dtype) noexcept { return facts(dtype).name; }
std::int64_t size_bytes(DType dtype) noexcept { return facts(dtype).bytes; }

std::string name(const Device& device) {
  if (device.kind == DeviceKind::kCpu) return "cpu";
  if (device.compute_capability > 0) return "sm_" + std::to_string(device.compute_capability);
  return "cuda:" + std::to_string(device.index);
}

float Problem::scale() const noexcept {
  return softmax_scale.value_or(static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

std::uint64_t hash(const Problem& problem) {
  std::uint64_t h = 0xcbf29ce484222325;  // FNV-1a over the canonical line: one text for equal problems
  for (const char c : to_string(problem)) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return h;
}

namespace {

/// Query–key pairs of one sequence: half of all where causal, exactly those inside a window.
double pairs(const Problem& p, double seqlen_q, double seqlen_kv) {
  if (!p.window_left && !p.window_right) return seqlen_q * seqlen_kv * (p.causal == Causal::kNone ? 1.0 : 0.5);
  const double offset = p.causal == Causal::kTopLeft ? 0.0 : seqlen_kv - seqlen_q;
  const auto distance = [&](std::optional<std::int64_t> window) {  // clipped: a longer one sees no more
    return std::min(static_cast<double>(window.value_or(std::int64_t{1} << 62)), seqlen_q + seqlen_kv);
  };
  const double begin = offset - distance(p.window_left);  // of row 0's keys, before they are clipped
  const double end = offset + (p.causal != Causal::kNone ? 0.0 : distance(p.window_right)) + 1;
  const auto keys = [&](double i) {
    return std::clamp(i + end, 0.0, seqlen_kv) - std::clamp(i + begin, 0.0, seqlen_kv);
  };
  // The number of keys is linear in the row except where an end of the interval meets the first key or the last.
  std::array<double, 6> turns{0.0, -end, seqlen_kv - end, -begin, seqlen_kv - begin, seqlen_q};
  for (double& row : turns) row = std::clamp(row, 0.0, seqlen_q);
  std::sort(turns.begin(), turns.end());
  double sum = 0;
  for (std::size_t t = 1; t < turns.size(); ++t)
    sum += (turns[t] - turns[t - 1]) * (keys(turns[t - 1]) + keys(turns[t] - 1)) / 2;
  return sum;
}

}  // namespace

double flops(const Problem& p) noexcept {
  const auto length = [&](const Lengths& slots, const Lengths& used, std::int64_t total, std::int64_t seqlen, auto b) {
    double n = static_cast<double>(seqlen);
    if (slots.present)
      n = slots.values.empty() ? static_cast<double>(total) / static_cast<double>(p.batch)
                               : static_cast<double>(slots.values[b]);
    return used.values.empty() ? n : std::min(n, static_cast<double>(used.values[b]));
  };
  const auto pairs_of = [&](std::size_t b) {
    return pairs(p, length(p.packed_q, p.q_lengths, p.total_q, p.seqlen_q, b),
                 length(p.packed_kv, p.kv_lengths, p.total_kv, p.seqlen_kv, b));
  };
  const std::size_t known = std::max(
      {p.packed_q.values.size(), p.packed_kv.values.size(), p.q_lengths.values.size(), p.kv_lengths.values.size()});
  double sum = 0;
  if (known == 0) sum = static_cast<double>(p.batch) * pairs_of(0);
  for (std::size_t b = 0; b < known; ++b) sum += pairs_of(b);
  const double passes = (p.forward() ? 1.0 : 0.0) + (p.backward() ? 2.5 : 0.0);
  return passes * 2.0 * static_cast<double>(p.head_dim + p.head_dim_v) * static_cast<double>(p.num_q_heads) * sum;
}

}  // namespace fovea
