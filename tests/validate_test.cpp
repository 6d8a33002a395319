#include "problem/validate.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "support.h"

namespace fovea {
namespace {

using test::Call;
using test::contains;
using test::random_valid_problem;
using test::refusal;

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
const std::string kEverything =
    "fwd+bwd fp16 b2 hq4 hkv2 sq5 skv7 d8 dv16 kvlen=7,3 qlen=5,2 mask=bhqk bias=1hqk:fp32 alibi=b sink";
const std::string kPacked = "fwd+bwd fp16 hq4 hkv2 d8 packed_q=5+2 packed_kv=3+7 kvlen=3,6 mask=bhqk";

TEST(Problems, AreRefusedByTheRuleTheyBreak) {
  struct Case {
    std::function<void(Problem&)> change;
    const char* sentence;
  };
  const Case cases[] = {
      {[](Problem& p) { p.num_q_heads = 12, p.num_kv_heads = 5; },
       "num_q_heads (12) must be a multiple of num_kv_heads (5)"},
      {[](Problem& p) { p.dtype = DType::kInt32; }, "dtype (int32)"},
      {[](Problem& p) { p.direction = static_cast<Direction>(3); }, "direction (3) must be one of"},
      {[](Problem& p) { p.causal = static_cast<Causal>(9); }, "causal (9) must be one of"},
      {[](Problem& p) { p.alibi = static_cast<Alibi>(3); }, "alibi (3) must be one of"},
      {[](Problem& p) { p.layout = static_cast<Layout>(200); }, "layout (200) must be one of"},
      {[](Problem& p) { p.batch = 0; }, "batch (0) must be at least 1"},
      {[](Problem& p) { p.num_kv_heads = -2; }, "num_kv_heads (-2)"},
      {[](Problem& p) { p.seqlen_q = -1; }, "seqlen_q (-1)"},
      {[](Problem& p) { p.head_dim = 513; }, "head_dim (513)"},
      {[](Problem& p) { p.head_dim_v = 0; }, "head_dim_v (0)"},
      {[](Problem& p) { p.seqlen_kv = kHuge; }, "seqlen_kv (9223372036854775807)"},
      {[](Problem& p) { p.batch = p.seqlen_q = std::int64_t{1} << 40; }, "q would hold more than 2^58 elements"},
      {[](Problem& p) { p.seqlen_q = p.seqlen_kv = std::int64_t{1} << 32; }, "mask would hold more than 2^58 elements"},
      {[](Problem& p) { p.seqlen_q = p.seqlen_kv = 0, p.batch = p.num_q_heads = std::int64_t{1} << 57, p.mask = {}; },
       "too large"},
      {[](Problem& p) { p.window_left = -1; }, "window_left (-1)"},
      {[](Problem& p) { p.window_right = kHuge; }, "window_right (9223372036854775807)"},
      {[](Problem& p) { p.softcap = kNan; }, "softcap (nan)"},
      {[](Problem& p) { p.softcap = std::numeric_limits<float>::infinity(); }, "softcap (inf)"},
      {[](Problem& p) { p.softmax_scale = kNan; }, "softmax_scale (nan)"},
      {[](Problem& p) { p.dropout.probability = kNan; }, "dropout (nan)"},
      {[](Problem& p) { p.dropout.probability = 1.0F; }, "dropout (1)"},
      {[](Problem& p) { p.dropout.probability = 0.999999F; }, "one in 65536"},
      {[](Problem& p) { p.bias_dtype = DType::kBFloat16; }, "bias_dtype (bf16)"},
      {[](Problem& p) { p.bias.reset(), p.bias_dtype = DType::kFloat16; }, "where there is no bias"},
      {[](Problem& p) { p.kv_lengths.values = {7}; }, "kv_lengths has the size 1 but batch is 2"},
      {[](Problem& p) { p.kv_lengths.values[1] = 9; }, "kv_lengths[1] (9) must be at most seqlen_kv (7)"},
      {[](Problem& p) { p.q_lengths.values[0] = -3; }, "q_lengths[0] (-3)"},
      {[](Problem& p) { p.q_lengths.present = false; }, "not present"},
      {[](Problem& p) { p.total_q = 3; }, "total_q (3)"},
      {[](Problem& p) { p.packed_q.present = true; }, "together"},
      {[](Problem& p) { p.layout = Layout::kQkvPacked; }, "qkv_packed"},
  };
  for (const Case& broken : cases) {
    Problem p = parse_problem(kEverything);
    broken.change(p);
    EXPECT_TRUE(contains(refusal([&] { validate(p); }), broken.sentence));
  }
  const Case packed[] = {
      {[](Problem& p) {
         p.packed_q.values = {5, 2, 0};
         p.packed_kv.values = {3, 7, 0};
       },
       "packed_q has the size 3 but batch is 2"},
      {[](Problem& p) { p.packed_kv.values = {10}; }, "packed_q has 2 sequences but packed_kv has 1"},
      {[](Problem& p) {
         p.packed_q.values = {5, -2};
       },
       "packed_q[1] (-2)"},
      {[](Problem& p) { p.seqlen_q = 6; }, "seqlen_q (6) must be the longest sequence of packed_q (5)"},
      {[](Problem& p) { p.total_kv = 11; }, "total_kv (11) must be the sum of packed_kv (10)"},
      {[](Problem& p) {
         p.kv_lengths.values = {4, 6};
       },
       "kv_lengths[0] (4) must be at most the length of its sequence"},
      {[](Problem& p) { p.packed_q.values.clear(), p.total_q = 11; }, "packed_q of 11 rows"},
  };
  for (const Case& broken : packed) {
    Problem p = parse_problem(kPacked);
    broken.change(p);
    EXPECT_TRUE(contains(refusal([&] { validate(p); }), broken.sentence));
  }
}

TEST(Problems, OfEveryValidKindAreAccepted) {
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const Problem p = random_valid_problem(seed, 20);
    EXPECT_NO_THROW(validate(p)) << to_string(p);
  }
}

void check_both(const Problem& p, const Call& call) {
  validate_forward(p, Device{}, call.in, call.out);
  validate_backward(p, Device{}, call.in, call.out);
}

TEST(Tensors, OfTheirProblemAreAccepted) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Problem p = random_valid_problem(seed, 5);
    p.direction = Direction::kForwardBackward;
    EXPECT_NO_THROW(check_both(p, Call(p))) << to_string(p);
  }
}

TEST(Tensors, MayLieInAnyStridesWithTheLastDimensionContiguous) {
  const Problem p = parse_problem(kEverything);
  Call call(p);
  std::vector<std::int16_t> heads_first(2 * 4 * 5 * 24);
  call.in.q = Tensor::contiguous(heads_first.data(), DType::kFloat16, {2, 4, 5, 24}).transposed(1, 2);
  call.in.q.shape[3] = 8;  // rows of 24 elements, of which 8 are q
  EXPECT_NO_THROW(check_both(p, call));
  call.in.dlse.strides = {0, 0, 0, 0};
  call.in.bias.strides = {0, 0, 0, 0};
  call.in.mask.strides[0] = 0;
  call.in.k.strides[0] = call.in.v.strides[1] = call.in.q.strides[2] = call.in.dout.strides[0] = 0;
  EXPECT_NO_THROW(check_both(p, call));
}

TEST(Tensors, ThatAreOptionalMayBeLeftOut) {
  const Problem p = parse_problem(kEverything);
  Call call(p);
  call.out.lse = call.in.dlse = call.out.dbias = call.out.dsink = call.out.dalibi_slopes = {};
  EXPECT_NO_THROW(validate_forward(p, Device{}, call.in, call.out));
  call.in.lse = Call(p).out.lse;
  call.in.lse.data = call.in.q.data;  // enough bytes of the wrong meaning: values are not looked at
  EXPECT_NO_THROW(validate_backward(p, Device{}, call.in, call.out));
}

TEST(Tensors, OfNoElementsNeedNoData) {
  const Problem p = parse_problem("fwd+bwd fp32 b2 hq1 sq0 skv3 d4");
  Call call(p);
  call.in.q.data = call.out.out.data = call.out.lse.data = call.out.dq.data = call.in.dout.data = nullptr;
  EXPECT_NO_THROW(check_both(p, call));
}

TEST(Tensors, HaveAtMostFourDimensions) {
  EXPECT_EQ(Tensor::contiguous(nullptr, DType::kFloat32, {2, 3, 4, 5}).rank, 4);
  EXPECT_TRUE(contains(refusal([] {
                         (void)Tensor::contiguous(nullptr, DType::kFloat32, {2, 3, 4, 5, 6});
                       }),
                       "a tensor has 5 dimensions but"));
}

TEST(Tensors, OfTheCpuMayNameAnyIndexOfIt) {
  const Problem p = parse_problem(kEverything);
  Call call(p);
  call.in.k.device.index = 3;
  EXPECT_NO_THROW(check_both(p, call));
  EXPECT_NO_THROW(validate_forward(p, Device{.index = 3}, call.in, call.out));
}

struct Fault {
  const char* tensor;
  std::function<void(Call&)> break_it;
  const char* sentence;
};

void expect_refused(const std::string& line, const Fault& fault) {
  const Problem p = parse_problem(line);
  Call call(p);
  fault.break_it(call);
  const std::string sentence = refusal([&] { check_both(p, call); });
  EXPECT_TRUE(contains(sentence, fault.sentence));
  EXPECT_TRUE(sentence.starts_with(fault.tensor)) << sentence;
}

std::int32_t* ints(const Tensor& t) { return static_cast<std::int32_t*>(t.data); }

TEST(Tensors, AreRefusedByWhatIsWrongWithThem) {
  const Fault faults[] = {
      {"q", [](Call& c) { c.in.q = {}; }, "is missing"},
      {"out", [](Call& c) { c.out.out = {}; }, "is missing"},
      {"dout", [](Call& c) { c.in.dout = {}; }, "is missing"},
      {"lse", [](Call& c) { c.in.lse = {}; }, "is missing"},
      {"dv", [](Call& c) { c.out.dv = {}; }, "is missing"},
      {"mask", [](Call& c) { c.in.mask = {}; }, "is missing"},
      {"kv_lengths", [](Call& c) { c.in.kv_lengths = {}; }, "is missing"},
      {"cu_seqlens_q", [](Call& c) { c.in.cu_seqlens_q = c.in.kv_lengths; }, "the problem has none"},
      {"k", [](Call& c) { c.in.k.shape[1] = 8; }, "has the shape [2, 8, 2, 8] but must have [2, 7, 2, 8]"},
      {"v", [](Call& c) { c.in.v.rank = 3; }, "has the shape [2, 7, 2] but must have [2, 7, 2, 16]"},
      {"v", [](Call& c) { c.in.v.rank = 9; }, "has 9 dimensions"},
      {"v", [](Call& c) { c.in.v.rank = -1; }, "has -1 dimensions"},
      {"bias", [](Call& c) { c.in.bias.shape[0] = 2; }, "has the shape [2, 4, 5, 7]"},
      {"k", [](Call& c) { c.in.k.dtype = DType::kBFloat16; }, "is bf16 but must be fp16"},
      {"lse", [](Call& c) { c.out.lse.dtype = DType::kInt32; }, "is int32 but must be fp32"},
      {"mask", [](Call& c) { c.in.mask.dtype = DType::kInt32; }, "is int32 but must be bool"},
      {"q", [](Call& c) { c.in.q.device.kind = DeviceKind::kCuda; }, "is on cuda:0 but the plan is for cpu"},
      {"q", [](Call& c) { c.in.q.data = nullptr; }, "data is null"},
      {"q", [](Call& c) { c.in.q.data = static_cast<char*>(c.in.q.data) + 1; }, "aligned to the 2 bytes"},
      {"q", [](Call& c) { c.in.q.strides[1] = -32; }, "stride of dimension 1 (-32) must not be negative"},
      {"q", [](Call& c) { c.in.q.strides[3] = 2; }, "last dimension must be contiguous, but its stride is 2"},
      {"dout", [](Call& c) { c.in.dout.strides[3] = 0; }, "last dimension must be contiguous, but its stride is 0"},
      {"q", [](Call& c) { c.in.q.strides[0] = std::numeric_limits<std::int64_t>::max(); }, "beyond 64-bit"},
      {"q", [](Call& c) { c.in.q.strides[0] = c.in.q.strides[1] = std::int64_t{1} << 61; }, "beyond 64-bit"},
      {"out", [](Call& c) { c.out.out.strides[0] = 0; }, "several elements in one place"},
      {"dk", [](Call& c) { c.out.dk.strides[1] = 15; }, "several elements in one place"},
      {"lse", [](Call& c) { c.out.lse.strides[2] = 0; }, "contiguous"},
      {"dbias", [](Call& c) { c.out.dbias.strides[1] = 0; }, "several elements in one place"},
      {"kv_lengths", [](Call& c) { ints(c.in.kv_lengths)[1] = 9; }, "[1] (9) must be at most seqlen_kv (7)"},
      {"q_lengths", [](Call& c) { ints(c.in.q_lengths)[0] = -1; }, "[0] (-1) must be at least 0"},
      {"kv_lengths", [](Call& c) { ints(c.in.kv_lengths)[1] = 2; }, "the length 2 but the problem states 3"},
      {"q_lengths", [](Call& c) { c.in.q_lengths.shape[0] = 1; }, "[1] but must have [2]"},
  };
  for (const Fault& fault : faults) expect_refused(kEverything, fault);
  const Fault packed[] = {
      {"cu_seqlens_q", [](Call& c) { c.in.cu_seqlens_q = {}; }, "is missing"},
      {"cu_seqlens_q", [](Call& c) { ints(c.in.cu_seqlens_q)[0] = 1; }, "[0] (1) must be 0"},
      {"cu_seqlens_kv", [](Call& c) { ints(c.in.cu_seqlens_kv)[2] = 9; }, "[2] (9) must be the number of rows, 10"},
      {"cu_seqlens_q", [](Call& c) { ints(c.in.cu_seqlens_q)[1] = 8; }, "[2] (7) must not be less than"},
      {"cu_seqlens_q", [](Call& c) { ints(c.in.cu_seqlens_q)[1] = 6; },
       "makes sequence 0 6 long, more than seqlen_q (5)"},
      {"cu_seqlens_kv", [](Call& c) { ints(c.in.cu_seqlens_kv)[1] = 4; }, "the length 4 but the problem states 3"},
      {"kv_lengths", [](Call& c) { ints(c.in.kv_lengths)[0] = 4; },
       "[0] (4) must be at most the length of its sequence (3)"},
      {"lse", [](Call& c) { c.out.lse.shape[0] = 5; }, "[5, 7] but must have [4, 7]"},
      {"dbias", [](Call& c) { c.out.dbias = c.in.mask; }, "the problem has none"},
      {"sink", [](Call& c) { c.in.sink = c.in.q; }, "the problem has none"},
  };
  for (const Fault& fault : packed) expect_refused(kPacked, fault);
}

TEST(Describe, FindsTheProblemThatTensorsPose) {
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    Problem p = random_valid_problem(seed, 5);
    p.layout = Layout::kBshd;                         // a plan takes any strides, so the problem of tensors names none
    const auto own = [&](std::optional<Extent>& e) {  // a dimension of one element is broadcast
      if (!e) return;
      *e = {e->batch && p.batch != 1, e->heads && p.num_q_heads != 1, e->queries && p.seqlen_q != 1,
            e->keys && p.seqlen_kv != 1};
    };
    own(p.mask);
    own(p.bias);
    const Call call(p);
    const Problem found = describe(p.direction, call.in.q, call.in.k, call.in.v, call.options(p));
    if (p.packed() && p.packed_q.values.empty()) p.packed_q = found.packed_q, p.seqlen_q = found.seqlen_q;
    if (p.packed() && p.packed_kv.values.empty()) p.packed_kv = found.packed_kv, p.seqlen_kv = found.seqlen_kv;
    if (p.q_lengths.values.empty()) p.q_lengths = found.q_lengths;
    if (p.kv_lengths.values.empty()) p.kv_lengths = found.kv_lengths;
    if (p.mask && p.packed()) p.mask = found.mask;  // lengths made up on the spot may leave one query or key
    if (p.bias && p.packed()) p.bias = found.bias;
    EXPECT_EQ(found, p) << to_string(found) << "\n" << to_string(p);
  }
}

TEST(Describe, TakesAMaskExpandedByStridesOf0AsBroadcast) {
  const Problem p = parse_problem(kEverything);
  Call call(p);
  call.in.mask.strides = {0, 0, 0, 1};
  call.in.bias.strides = {0, 0, 0, 1};
  const auto found = [&] { return describe(p.direction, call.in.q, call.in.k, call.in.v, call.options(p)); };
  EXPECT_EQ(found().mask, (Extent{.keys = true}));
  EXPECT_EQ(found().bias, p.bias) << "dbias has all its entries";
  EXPECT_NO_THROW(check_both(found(), call));
  call.in.mask.shape[1] = 3;
  EXPECT_TRUE(contains(refusal([&] { check_both(found(), call); }), "mask has the shape [2, 3, 5, 7] but must have"));
  call.in.mask.shape[1] = 4;
  call.in.mask.strides[1] = 7;
  Problem broadcast = p;
  broadcast.mask = Extent{.keys = true};
  EXPECT_TRUE(contains(refusal([&] { check_both(broadcast, call); }), "mask has the shape [2, 4, 5, 7] but must have"));
}

TEST(Describe, LeavesLengthsOnAGpuToTheRun) {
  const Problem p = parse_problem(kPacked);
  Call call(p);
  for (Tensor* t : {&call.in.q, &call.in.k, &call.in.v, &call.in.cu_seqlens_q, &call.in.cu_seqlens_kv,
                    &call.in.kv_lengths, &call.in.mask}) {
    t->device.kind = DeviceKind::kCuda;
  }
  AttentionOptions options = call.options(p);
  const auto found = [&] { return describe(Direction::kForward, call.in.q, call.in.k, call.in.v, options); };
  EXPECT_TRUE(contains(refusal([&] { (void)found(); }), "max_seqlen_q (0) must be given"));
  options.max_seqlen_q = 5;
  options.max_seqlen_kv = 1 << 30;
  EXPECT_EQ(to_string(found()),
            "fwd fp16 b2 hq4 hkv2 sq5 skv10 d8 packed_q=random:7 packed_kv=random:10 kvlen=random mask=bhqk");
}

TEST(Describe, TakesTheLongestSequenceThatIsGivenOnEveryDevice) {
  const Problem p = parse_problem("fwd fp16 hq4 hkv2 d8 packed_q=2+5 packed_kv=3+7 mask=bhqk");
  const auto longest = [&](DeviceKind kind, std::int64_t q, std::int64_t kv) {
    Call call(p);
    for (Tensor* t : {&call.in.q, &call.in.k, &call.in.v, &call.in.cu_seqlens_q, &call.in.cu_seqlens_kv, &call.in.mask})
      t->device.kind = kind;
    AttentionOptions options = call.options(p);
    options.max_seqlen_q = q;
    options.max_seqlen_kv = kv;
    const Problem found = describe(Direction::kForward, call.in.q, call.in.k, call.in.v, options);
    return std::pair{found.seqlen_q, found.seqlen_kv};
  };
  for (const auto& [q, kv] : {std::pair{5, 7}, {6, 7}, {5, 9}, {7, 10}, {100, 100}}) {
    const std::pair<std::int64_t, std::int64_t> given{std::min(q, 7), std::min(kv, 10)};
    EXPECT_EQ(longest(DeviceKind::kCpu, q, kv), given);
    EXPECT_EQ(longest(DeviceKind::kCuda, q, kv), given);
  }
  EXPECT_EQ(longest(DeviceKind::kCpu, 0, 0), (std::pair<std::int64_t, std::int64_t>{5, 7}));
}

TEST(Describe, RefusesTensorsThatDoNotFitTogether) {
  const Problem padded = parse_problem(kEverything), packed = parse_problem(kPacked);
  const auto why_not = [](const Problem& p, const std::function<void(Call&, AttentionOptions&)>& break_it) {
    Call call(p);
    AttentionOptions options = call.options(p);
    break_it(call, options);
    return refusal([&] { (void)describe(Direction::kForward, call.in.q, call.in.k, call.in.v, options); });
  };
  const auto of = [&](auto change) { return why_not(padded, [&](Call& c, AttentionOptions&) { change(c.in); }); };
  EXPECT_TRUE(contains(of([](Inputs& in) { in.q = {}; }), "q is missing"));
  EXPECT_TRUE(contains(of([](Inputs& in) { in.k.rank = 3; }), "k has 3 dimensions but must be [batch, seqlen_kv"));
  EXPECT_TRUE(contains(of([](Inputs& in) { in.v.shape[0] = -2; }), "v's dimension 0 (-2)"));
  EXPECT_TRUE(contains(of([](Inputs& in) { in.v.dtype = DType::kFloat32; }), "share one dtype"));
  EXPECT_TRUE(contains(of([](Inputs& in) { in.v.shape[2] = 1; }), "num_kv_heads differs: 2 in k and 1 in v"));
  EXPECT_TRUE(contains(of([](Inputs& in) { in.k.shape[3] = 9; }), "head_dim differs: 8 in q and 9 in k"));
  EXPECT_TRUE(contains(of([](Inputs& in) { in.k.shape[1] = 9; }), "seqlen_kv differs: 9 in k and 7 in v"));
  EXPECT_TRUE(contains(of([](Inputs& in) { in.q.shape[0] = 9; }), "batch differs: 9 in q and 2 in k"));
  const auto with = [&](const Problem& p, auto change) {
    return why_not(p, [&](Call&, AttentionOptions& o) { change(o); });
  };
  using O = AttentionOptions;
  EXPECT_TRUE(contains(with(padded, [](O& o) { o.mask.rank = 2; }), "mask has 2 dimensions"));
  EXPECT_TRUE(contains(with(padded, [](O& o) { o.bias.dtype = DType::kBFloat16; }),
                       "bias is bf16 but must be fp32 or q's dtype, fp16"));
  EXPECT_TRUE(contains(with(padded, [](O& o) { o.kv_lengths.dtype = DType::kBool; }), "kv_lengths is bool"));
  EXPECT_TRUE(
      contains(with(padded, [](O& o) { o.kv_lengths.data = nullptr; }), "kv_lengths is [2] but its data is null"));
  EXPECT_TRUE(contains(with(padded, [](O& o) { o.kv_lengths.shape[0] = 3; }), "kv_lengths has the shape [3]"));
  EXPECT_TRUE(contains(with(padded, [](O& o) { o.softcap = -1; }), "softcap (-1)"));
  EXPECT_TRUE(contains(with(packed, [](O& o) { o.cu_seqlens_kv = {}; }), "together"));
  EXPECT_TRUE(contains(with(packed, [](O& o) { o.cu_seqlens_kv.shape[0] = 2; }), "number of sequences differs: 2"));
  EXPECT_TRUE(
      contains(with(packed, [](O& o) { o.cu_seqlens_q.shape[0] = o.cu_seqlens_kv.shape[0] = 0; }), "0 elements"));
  EXPECT_TRUE(contains(with(packed, [](O& o) { o.max_seqlen_q = 4; }), "max_seqlen_q (4) is less than"));
  EXPECT_TRUE(contains(with(padded, [](O& o) { o.max_seqlen_q = 4; }), "max_seqlen_q (4) belongs to packed"));
  EXPECT_TRUE(contains(with(padded, [](O& o) { o.max_seqlen_kv = -1; }), "max_seqlen_kv (-1) belongs to packed"));
}

}  // namespace
}  // namespace fovea
