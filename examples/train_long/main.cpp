// A small language model learns TEXT byte by byte, sequences of each length in turn: a stack of encoder layers with
// dropout, causal, in which a byte sees its own document alone.  Documents stand packed one behind the other, so
// nothing of size length × length is ever made; what a step takes and the most memory that it held are printed.
#include <fovea/error.h>
#include <fovea/nn/nn.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace {

using namespace fovea;

constexpr const char* kUsage =
    "usage: train_long TEXT [--device cpu|cuda] [--lengths 2048,4096,...] [--steps N] [--layers N] [--width N]\n"
    "                  [--heads N] [--json FILE]";
constexpr std::string_view kOptions[] = {"--device", "--lengths", "--steps", "--layers",
                                         "--width",  "--heads",   "--json"};
constexpr std::int64_t kBytes = 256;
constexpr char kEndOfDocument = '\f';

struct Settings {
  std::string text, json;
  Device device;
  std::vector<std::int64_t> lengths{2048, 4096, 8192, 16384};
  std::int64_t steps = 4, layers = 2, width = 512, heads = 8;
};

/// A number above 0: nothing is learnt from none.
std::int64_t number(std::string_view word) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (error != std::errc{} || end != word.data() + word.size() || value < 1) {
    throw Error(ErrorCode::kInvalidArgument, "'" + std::string(word) + "' must be a whole number above 0");
  }
  return value;
}

std::vector<std::int64_t> numbers(std::string_view list) {
  std::vector<std::int64_t> all;
  for (std::size_t begin = 0; begin <= list.size();) {
    const std::size_t end = std::min(list.find(',', begin), list.size());
    all.push_back(number(list.substr(begin, end - begin)));
    begin = end + 1;
  }
  return all;
}

Settings settings_of(int count, char** words) {
  Settings s;
  for (int i = 1; i < count; ++i) {
    const std::string_view word = words[i];
    if (!word.starts_with("--")) {
      if (!s.text.empty()) throw Error(ErrorCode::kInvalidArgument, "'" + std::string(word) + "' is a second text");
      s.text = word;
      continue;
    }
    if (std::ranges::find(kOptions, word) == std::end(kOptions)) {
      throw Error(ErrorCode::kInvalidArgument, "unknown option '" + std::string(word) + "'; see train_long --help");
    }
    if (++i == count) throw Error(ErrorCode::kInvalidArgument, std::string(word) + " needs a value");
    const std::string value = words[i];
    if (word == "--device") {
      if (value != "cpu" && value != "cuda") {
        throw Error(ErrorCode::kInvalidArgument, "--device '" + value + "' is unknown; use cpu or cuda");
      }
      s.device.kind = value == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu;
    } else if (word == "--lengths") {
      s.lengths = numbers(value);
    } else if (word == "--steps") {
      s.steps = number(value);
    } else if (word == "--layers") {
      s.layers = number(value);
    } else if (word == "--width") {
      s.width = number(value);
    } else if (word == "--heads") {
      s.heads = number(value);
    } else {
      s.json = value;
    }
  }
  if (s.text.empty()) throw Error(ErrorCode::kInvalidArgument, "name a text to learn; documents end in form feeds");
  return s;
}

/// Bytes become vectors, encoder layers read them, and a last product says which byte comes next.
struct ByteModel : nn::Module {
  nn::Linear embedding, head;
  nn::TransformerEncoder encoder;

  ByteModel(const Settings& s, DType dtype)
      : embedding({.in_features = kBytes, .out_features = s.width, .bias = false, .dtype = dtype, .device = s.device}),
        head({.in_features = s.width, .out_features = kBytes, .dtype = dtype, .device = s.device, .seed = 1}),
        encoder({.layer = {.d_model = s.width,
                           .nhead = s.heads,
                           .dim_feedforward = 4 * s.width,
                           .dropout = 0.1F,
                           .activation = nn::Activation::kGelu,
                           .batch_first = true,
                           .norm_first = true,
                           .rotary = nn::Rotary{},
                           .dtype = dtype,
                           .device = s.device,
                           .seed = 2},
                 .num_layers = s.layers,
                 .norm = true}) {}

  void visit(const std::string& prefix, const Visit& visit) override {
    embedding.visit(prefix + "embedding.", visit);
    encoder.visit(prefix + "encoder.", visit);
    head.visit(prefix + "head.", visit);
  }
};

/// A piece of the text: each byte as a row with a single 1, the byte after it, and where documents begin.
struct Batch {
  nn::Array inputs, next;
  std::vector<std::int32_t> ends{0};

  Batch(const std::string& text, std::size_t first, std::int64_t length, DType dtype, const Device& device)
      : inputs(dtype, {length, kBytes}, device), next(DType::kInt32, {length}, device) {
    std::vector<float> ones(static_cast<std::size_t>(length * kBytes));
    std::vector<std::int32_t> following(static_cast<std::size_t>(length));
    for (std::int64_t i = 0; i < length; ++i) {
      const auto at = [&](std::size_t place) { return static_cast<unsigned char>(text[place % text.size()]); };
      const std::size_t place = first + static_cast<std::size_t>(i);
      ones[static_cast<std::size_t>(i * kBytes + at(place))] = 1.0F;
      const bool last = at(place) == kEndOfDocument || i + 1 == length;
      following[static_cast<std::size_t>(i)] = last ? -1 : at(place + 1);
      if (last) ends.push_back(static_cast<std::int32_t>(i + 1));
    }
    nn::copy(Tensor::contiguous(ones.data(), DType::kFloat32, {length, kBytes}), inputs.view());
    nn::copy(Tensor::contiguous(following.data(), DType::kInt32, {length}), next.view());
  }
};

struct Outcome {
  std::int64_t length = 0, documents = 0;
  double milliseconds = 0.0, loss = 0.0;
  std::size_t peak_bytes = 0;
};

Outcome train(const Settings& s, const std::string& text, std::int64_t length) {
  const DType dtype = s.device.kind == DeviceKind::kCpu ? DType::kFloat32 : DType::kBFloat16;
  ByteModel model(s, dtype);
  nn::AdamW optimiser(model, {.lr = 3e-4F});
  Outcome outcome{.length = length};
  std::vector<double> times;
  (void)nn::peak_bytes(s.device, true);
  for (std::int64_t step = 0; step <= s.steps; ++step) {  // the first is a rehearsal, which compiles kernels
    const Batch batch(text, static_cast<std::size_t>(step * length), length, dtype, s.device);
    const auto start = std::chrono::steady_clock::now();
    nn::AttentionCall call;
    call.causal = Causal::kTopLeft;
    call.cu_seqlens_q = Tensor::contiguous(batch.ends.data(), DType::kInt32, {std::ssize(batch.ends)});
    call.training = true;
    call.seed = static_cast<std::uint64_t>(step);
    const nn::Array x = model.embedding.forward(batch.inputs.view());
    const auto encoded = model.encoder.forward(x.view(), call);
    const nn::Array logits = model.head.forward(encoded.out.view());
    const nn::Array mean = nn::cross_entropy(logits.view(), batch.next.view(), logits.view());  // now the gradient
    nn::zero_gradients(model);
    const nn::Array dencoded = model.head.backward(encoded.out.view(), logits.view());
    const nn::Array dx = model.encoder.backward(*encoded.state, dencoded.view());
    (void)model.embedding.backward(batch.inputs.view(), dx.view());
    optimiser.step();
    float loss = 0.0F;
    nn::copy(mean.view(), Tensor::contiguous(&loss, DType::kFloat32, {1}));  // waits for a GPU
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    if (step > 0) times.push_back(taken.count());
    outcome.loss = static_cast<double>(loss);
    outcome.documents = std::ssize(batch.ends) - 1;
  }
  std::nth_element(times.begin(), times.begin() + std::ssize(times) / 2, times.end());
  outcome.milliseconds = times.empty() ? 0.0 : times[times.size() / 2];
  outcome.peak_bytes = nn::peak_bytes(s.device);
  return outcome;
}

void run(const Settings& s) {
  std::ifstream file(s.text, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (text.empty()) throw Error(ErrorCode::kInvalidArgument, "'" + s.text + "' cannot be read or is empty");
  if (!s.json.empty() && !std::ofstream(s.json, std::ios::app))  // said now, not after hours of training
    throw Error(ErrorCode::kInvalidArgument, "'" + s.json + "' cannot be written");
  std::printf("%zu bytes of text, %lld layers of %lld features, dropout 0.1, on %s\n\n", text.size(),
              static_cast<long long>(s.layers), static_cast<long long>(s.width), name(s.device).c_str());
  std::puts("   length  documents        a step     tokens/s    most memory  a token     loss");
  std::string json;
  for (const std::int64_t length : s.lengths) {
    const Outcome o = train(s, text, length);
    std::printf("%9lld  %9lld  %9.1f ms  %11.0f  %9.1f MiB  %5.1f KiB  %7.4f\n", static_cast<long long>(o.length),
                static_cast<long long>(o.documents), o.milliseconds,
                1e3 * static_cast<double>(o.length) / o.milliseconds, static_cast<double>(o.peak_bytes) / 0x1p20,
                static_cast<double>(o.peak_bytes) / 0x1p10 / static_cast<double>(o.length), o.loss);
    std::fflush(stdout);
    char line[256];
    std::snprintf(line, sizeof line,
                  R"(%s{"length": %lld, "documents": %lld, "ms": %.3f, "peak_bytes": %zu, "loss": %.6f})",
                  json.empty() ? "" : ",\n ", static_cast<long long>(o.length), static_cast<long long>(o.documents),
                  o.milliseconds, o.peak_bytes, o.loss);
    json += line;
  }
  if (s.json.empty()) return;
  std::ofstream written(s.json);
  written << "[" << json << "]\n";
  written.close();
  if (!written) throw Error(ErrorCode::kDevice, "'" + s.json + "' cannot be written");
}

}  // namespace

int main(int count, char** words) {
  if (count == 2 && words[1] == std::string_view("--help")) {
    std::puts(kUsage);
    return 0;
  }
  try {
    run(settings_of(count, words));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_long: %s\n", error.what());
    return 1;
  }
  return 0;
}
