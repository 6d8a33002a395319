#include "random_problem.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "random.h"

namespace fovea::tools {
namespace {

using Values = std::vector<std::int64_t>;

// What one problem may cost: query–key pairs times head dims.  Keeps 20,000 of them within minutes.
constexpr double kMostWork = 4.0e6;
constexpr std::int64_t kFewRows = 8;

class Maker {
 public:
  Maker(std::uint64_t seed, std::uint64_t kind) : draw_(seed), kind_(kind, kKind) {}

  Problem make() {
    p_.direction = kind_.one_of({Direction::kForward, Direction::kBackward, Direction::kForwardBackward});
    p_.dtype = kind_.one_of({DType::kFloat32, DType::kFloat32, DType::kFloat16, DType::kBFloat16});
    p_.head_dim = head_dim();
    p_.head_dim_v = kind_.chance(0.3) ? head_dim() : p_.head_dim;
    p_.layout = draw_.one_of({Layout::kBshd, Layout::kBshd, Layout::kBhsd, Layout::kQkvPacked});
    p_.num_kv_heads = draw_.chance(0.5) ? 1 : draw_.between(2, 3);
    p_.num_q_heads = p_.num_kv_heads * (draw_.chance(0.45) ? 1 : draw_.between(2, 4));
    if (draw_.chance(0.4)) {
      packed_lengths();
    } else {
      padded_lengths();
    }
    lengths(p_.q_lengths, slots_q_);
    lengths(p_.kv_lengths, slots_kv_);
    band();
    scores();
    p_.deterministic = kind_.chance(0.3);
    return p_;
  }

 private:
  std::int64_t head_dim() {
    switch (kind_.between(0, 9)) {
      case 0:
        return kind_.chance(0.5) ? 8 * kind_.between(17, 32) : kind_.between(129, 512);
      case 1:
        return kind_.one_of({256, 512, 511, 384, 320});
      case 2:
      case 3:
        return kind_.one_of({16, 32, 64, 128, 96, 80, 40, 72});
      case 4:
        return kind_.between(1, 8);
      default:
        return kind_.between(1, 128);
    }
  }

  std::int64_t seqlen() {
    switch (draw_.between(0, 9)) {
      case 0:
        return draw_.between(0, 2);
      case 1:
        return draw_.between(81, 300);
      case 2:
      case 3:  // the edges of tiles
        return std::max<std::int64_t>(0, draw_.one_of({16, 24, 48, 64}) * draw_.between(1, 3) + draw_.between(-1, 1));
      default:
        return draw_.between(0, 80);
    }
  }

  /// Fewer heads and sequences, then shorter ones, until the work is small.
  [[nodiscard]] double work(double pairs) const {
    return pairs * static_cast<double>(p_.num_q_heads * (p_.head_dim + p_.head_dim_v));
  }
  void shed_heads() {
    if (p_.num_q_heads > 4) p_.num_q_heads = p_.num_kv_heads * (p_.num_q_heads > p_.num_kv_heads ? 2 : 1);
  }

  void padded_lengths() {
    p_.batch = draw_.between(1, 3);
    const bool few = draw_.chance(0.1);  // rows and many keys, as in the generation of text
    const std::int64_t q = few ? draw_.between(1, kFewRows) : seqlen();
    const std::int64_t kv = few ? draw_.between(200, 1500) : draw_.chance(0.4) ? q : seqlen();
    p_.seqlen_q = q;
    p_.seqlen_kv = p_.layout == Layout::kQkvPacked ? q : kv;
    const auto cost = [&] { return work(static_cast<double>(p_.batch * p_.seqlen_q * p_.seqlen_kv)); };
    if (cost() > kMostWork) p_.batch = std::min<std::int64_t>(p_.batch, 2);
    if (cost() > kMostWork) shed_heads();
    while (cost() > kMostWork) {
      if (p_.seqlen_q > kFewRows || p_.seqlen_q == p_.seqlen_kv) p_.seqlen_q = p_.seqlen_q * 3 / 4;
      p_.seqlen_kv = p_.seqlen_kv * 3 / 4;
    }
    slots_q_.assign(static_cast<std::size_t>(p_.batch), p_.seqlen_q);
    slots_kv_.assign(static_cast<std::size_t>(p_.batch), p_.seqlen_kv);
  }

  void packed_lengths() {
    p_.batch = draw_.between(1, 4);
    const bool alike = p_.layout == Layout::kQkvPacked || draw_.chance(0.4);
    const auto draw_slots = [&] {
      Values slots;
      for (std::int64_t b = 0; b < p_.batch; ++b) slots.push_back(seqlen());
      return slots;
    };
    Values &q = slots_q_, &kv = slots_kv_;
    q = draw_slots();
    kv = alike ? q : draw_slots();
    const auto cost = [&] {
      double pairs = 0.0;
      for (std::size_t b = 0; b < q.size(); ++b) pairs += static_cast<double>(q[b] * kv[b]);
      return work(pairs);
    };
    if (cost() > kMostWork) shed_heads();
    while (cost() > kMostWork) {
      for (Values* slots : {&q, &kv}) {
        for (std::int64_t& slot : *slots) slot = slot * 3 / 4;
      }
    }
    const bool at_run_time = draw_.chance(0.4);
    const auto keep = [&](const Values& slots, Lengths& packed, std::int64_t& longest, std::int64_t& total) {
      packed = {true, at_run_time ? Values{} : slots};
      longest = *std::max_element(slots.begin(), slots.end());
      for (const std::int64_t slot : slots) total += slot;
    };
    keep(q, p_.packed_q, p_.seqlen_q, p_.total_q);
    keep(kv, p_.packed_kv, p_.seqlen_kv, p_.total_kv);
  }

  /// Lengths within the slots.
  void lengths(Lengths& lengths, const Values& slots) {
    if (!draw_.chance(0.35)) return;
    lengths.present = true;
    if (draw_.chance(0.5)) return;  // known at run time alone
    for (const std::int64_t slot : slots) {
      lengths.values.push_back(draw_.chance(0.1) ? 0 : draw_.chance(0.2) ? slot : draw_.between(0, slot));
    }
  }

  void band() {
    p_.causal = kind_.one_of({Causal::kNone, Causal::kNone, Causal::kTopLeft, Causal::kBottomRight});
    const auto side = [&]() -> std::optional<std::int64_t> {
      if (!kind_.chance(0.3)) return {};
      if (draw_.chance(0.05)) return std::int64_t{1} << 58;
      return draw_.chance(0.3) ? draw_.between(0, 2) : draw_.between(0, 100);
    };
    p_.window_left = side();
    p_.window_right = side();
  }

  Extent extent() { return {draw_.chance(0.5), draw_.chance(0.5), draw_.chance(0.6), draw_.chance(0.7)}; }

  void scores() {
    if (kind_.chance(0.35)) p_.mask = extent();
    if (kind_.chance(0.4)) {
      p_.bias = extent();
      p_.bias_dtype = kind_.chance(0.5) ? p_.dtype : DType::kFloat32;
    }
    if (kind_.chance(0.4)) p_.alibi = draw_.one_of({Alibi::kPerHead, Alibi::kPerBatchAndHead});
    p_.sink = draw_.chance(0.3);
    if (kind_.chance(0.3)) p_.softcap = draw_.one_of({0.5F, 1.0F, 5.0F, 30.0F, 50.0F});
    if (draw_.chance(0.3)) p_.softmax_scale = draw_.one_of({0.125F, 0.3F, 1.0F, 0.02F, -0.2F, 0.0F});
    if (kind_.chance(0.3)) {
      p_.dropout.probability = draw_.one_of({0.1F, 0.5F, 0.2F, 0.9F, 0.003F, 0.99F});
      p_.dropout.seed = draw_.chance(0.5) ? draw_.bits() : 7;
      p_.dropout.offset = draw_.chance(0.5) ? draw_.bits() : 0;
    }
  }

  static constexpr std::uint64_t kKind = 1;  // a stream of random numbers

  Draw draw_;
  Draw kind_;  // of what GPU kernels are specialised for
  Problem p_;
  Values slots_q_, slots_kv_;  // of the sequences, padded or packed
};

bool has_zero(const Lengths& lengths) {
  return std::find(lengths.values.begin(), lengths.values.end(), 0) != lengths.values.end();
}

constexpr Option kOptions[] = {
    {"fwd", "direction", [](const Problem& p) { return p.direction == Direction::kForward; }},
    {"bwd", "direction", [](const Problem& p) { return p.direction == Direction::kBackward; }},
    {"fwd+bwd", "direction", [](const Problem& p) { return p.direction == Direction::kForwardBackward; }},
    {"fp32", "dtype", [](const Problem& p) { return p.dtype == DType::kFloat32; }},
    {"fp16", "dtype", [](const Problem& p) { return p.dtype == DType::kFloat16; }},
    {"bf16", "dtype", [](const Problem& p) { return p.dtype == DType::kBFloat16; }},
    {"gqa", "heads", [](const Problem& p) { return p.num_kv_heads > 1 && p.num_q_heads > p.num_kv_heads; }},
    {"mqa", "heads", [](const Problem& p) { return p.num_kv_heads == 1 && p.num_q_heads > 1; }},
    {"odd d", "", [](const Problem& p) { return p.head_dim % 2 == 1; }},
    {"d>128", "", [](const Problem& p) { return p.head_dim > 128; }},
    {"dv!=d", "", [](const Problem& p) { return p.head_dim_v != p.head_dim; }},
    {"sq!=skv", "", [](const Problem& p) { return p.seqlen_q != p.seqlen_kv; }},
    {"a length of 0", "",
     [](const Problem& p) {
       return p.seqlen_q == 0 || p.seqlen_kv == 0 || has_zero(p.packed_q) || has_zero(p.packed_kv) ||
              has_zero(p.q_lengths) || has_zero(p.kv_lengths);
     }},
    {"packed", "packed", [](const Problem& p) { return !p.packed_q.values.empty(); }},
    {"packed=random", "packed", [](const Problem& p) { return p.packed() && p.packed_q.values.empty(); }},
    {"packed_q!=packed_kv", "", [](const Problem& p) { return p.packed_q != p.packed_kv || p.total_q != p.total_kv; }},
    {"qlen", "qlen", [](const Problem& p) { return !p.q_lengths.values.empty(); }},
    {"qlen=random", "qlen", [](const Problem& p) { return p.q_lengths.present && p.q_lengths.values.empty(); }},
    {"kvlen", "kvlen", [](const Problem& p) { return !p.kv_lengths.values.empty(); }},
    {"kvlen=random", "kvlen", [](const Problem& p) { return p.kv_lengths.present && p.kv_lengths.values.empty(); }},
    {"top_left", "corner", [](const Problem& p) { return p.causal == Causal::kTopLeft; }},
    {"bottom_right", "corner", [](const Problem& p) { return p.causal == Causal::kBottomRight; }},
    {"window_left", "", [](const Problem& p) { return p.window_left.has_value(); }},
    {"window_right", "", [](const Problem& p) { return p.window_right.has_value(); }},
    {"mask", "", [](const Problem& p) { return p.mask.has_value(); }},
    {"bias:fp32", "bias", [](const Problem& p) { return p.bias && p.bias_dtype == DType::kFloat32; }},
    {"bias:16 bits", "bias", [](const Problem& p) { return p.bias && p.bias_dtype != DType::kFloat32; }},
    {"alibi", "alibi", [](const Problem& p) { return p.alibi == Alibi::kPerHead; }},
    {"alibi=b", "alibi", [](const Problem& p) { return p.alibi == Alibi::kPerBatchAndHead; }},
    {"sink", "", [](const Problem& p) { return p.sink; }},
    {"softcap", "", [](const Problem& p) { return p.softcap != 0.0F; }},
    {"scale", "", [](const Problem& p) { return p.softmax_scale.has_value(); }},
    {"dropout", "", [](const Problem& p) { return p.dropout.probability != 0.0F; }},
    {"bhsd", "layout", [](const Problem& p) { return p.layout == Layout::kBhsd; }},
    {"qkv_packed", "layout", [](const Problem& p) { return p.layout == Layout::kQkvPacked; }},
    {"deterministic", "", [](const Problem& p) { return p.deterministic; }},
};

// Beside those of one choice, the only pairs that the contract rules out.
constexpr std::pair<std::string_view, std::string_view> kImpossible[] = {
    {"fp32", "bias:16 bits"},               // a bias is fp32 or of the problem's dtype
    {"sq!=skv", "qkv_packed"},              // one row holds a token's q, k and v
    {"packed_q!=packed_kv", "qkv_packed"},  // likewise
};

}  // namespace

Problem random_problem(std::uint64_t seed, std::uint64_t kind) { return Maker(seed, kind).make(); }
Problem random_problem(std::uint64_t seed) { return random_problem(seed, seed); }

std::span<const Option> all_options() { return kOptions; }

bool exclude_each_other(const Option& a, const Option& b) {
  const std::string_view choice = a.choice;
  if (!choice.empty() && choice == b.choice) return a.name != b.name;
  return std::ranges::any_of(kImpossible, [&](const auto& pair) {
    return pair == std::pair<std::string_view, std::string_view>(a.name, b.name) ||
           pair == std::pair<std::string_view, std::string_view>(b.name, a.name);
  });
}

}  // namespace fovea::tools
