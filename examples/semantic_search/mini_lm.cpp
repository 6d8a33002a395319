#include "mini_lm.h"

#include <algorithm>
#include <cmath>

using namespace fovea;

namespace {

constexpr std::int64_t kWords = 30522, kPositions = 512, kTypes = 2, kLayers = 6;
constexpr std::size_t kLongest = 256;        // tokens of a sentence that are read
constexpr std::size_t kTokensAtOnce = 4096;  // of a packed batch
constexpr float kEps = 1e-12F;

float* floats(const nn::Array& array) { return static_cast<float*>(array.view().data); }

/// The same array where it is on that device already, else a copy there.
nn::Array placed(const nn::Array& array, const Device& device) {
  const Tensor& view = array.view();
  if (view.device == device) return array;
  nn::Array there(view.dtype, std::span(view.shape).first(static_cast<std::size_t>(view.rank)), device);
  nn::copy(view, there.view());
  return there;
}

nn::TransformerEncoder::Options encoder_options(const Device& device) {
  nn::TransformerEncoder::Options options;
  options.layer = {.d_model = MiniLm::kFeatures,
                   .nhead = 12,
                   .dim_feedforward = 4 * MiniLm::kFeatures,
                   .dropout = 0.0F,
                   .activation = nn::Activation::kGelu,
                   .layer_norm_eps = kEps,
                   .batch_first = true,
                   .device = device};
  options.num_layers = kLayers;
  return options;
}

/// The model's parameters under BERT's names.  Its three projections are one matrix in Fovea's layers, as in torch's.
class BertNames : public nn::Module {
 public:
  BertNames(nn::Parameter& words, nn::Parameter& positions, nn::Parameter& types, nn::LayerNorm& norm,
            nn::TransformerEncoder& encoder)
      : words_(words), positions_(positions), types_(types), norm_(norm), encoder_(encoder) {
    for (std::int64_t i = 0; i < 3 * kLayers; ++i) {
      projections_.emplace_back(
          nn::Linear::Options{.in_features = MiniLm::kFeatures, .out_features = MiniLm::kFeatures});
    }
  }

  void visit(const std::string& prefix, const Visit& visit) override {
    const std::string embeddings = prefix + "embeddings.";
    visit(embeddings + "word_embeddings.weight", words_);
    visit(embeddings + "position_embeddings.weight", positions_);
    visit(embeddings + "token_type_embeddings.weight", types_);
    norm_.visit(embeddings + "LayerNorm.", visit);
    for (std::size_t l = 0; l < encoder_.layers.size(); ++l) {
      const std::string at = prefix + "encoder.layer." + std::to_string(l) + ".";
      nn::TransformerEncoderLayer& layer = encoder_.layers[l];
      for (std::size_t i = 0; i < 3; ++i) {
        constexpr const char* kNames[] = {"query.", "key.", "value."};
        projections_[3 * l + i].visit(at + "attention.self." + kNames[i], visit);
      }
      visit(at + "attention.output.dense.weight", layer.self_attn.out_proj_weight);
      visit(at + "attention.output.dense.bias", layer.self_attn.out_proj_bias);
      layer.norm1.visit(at + "attention.output.LayerNorm.", visit);
      layer.linear1.visit(at + "intermediate.dense.", visit);
      layer.linear2.visit(at + "output.dense.", visit);
      layer.norm2.visit(at + "output.LayerNorm.", visit);
    }
  }

  /// After loading: query, key and value below each other.
  void join_projections() const {
    for (std::size_t i = 0; i < projections_.size(); ++i) {
      const nn::MultiheadAttention& attention = encoder_.layers[i / 3].self_attn;
      const auto put = [&](const nn::Array& part, const nn::Array& whole) {
        Tensor third = whole.view();
        third.data = static_cast<std::byte*>(third.data) + i % 3 * part.size_bytes();
        third.shape[0] /= 3;
        nn::copy(part.view(), third);
      };
      put(projections_[i].weight.value, attention.in_proj_weight.value);
      put(projections_[i].bias.value, attention.in_proj_bias.value);
    }
  }

 private:
  nn::Parameter &words_, &positions_, &types_;
  nn::LayerNorm& norm_;
  nn::TransformerEncoder& encoder_;
  std::vector<nn::Linear> projections_;
};

}  // namespace

MiniLm::MiniLm(const std::string& folder, const Device& device)
    : device_(device),
      word_piece_(folder + "/vocab.txt"),
      words_(DType::kFloat32, {kWords, kFeatures}, {}),
      positions_(DType::kFloat32, {kPositions, kFeatures}, {}),
      types_(DType::kFloat32, {kTypes, kFeatures}, {}),
      norm_({.features = kFeatures, .eps = kEps, .device = device}),
      encoder_(encoder_options(device)) {
  BertNames names(words_, positions_, types_, norm_, encoder_);
  nn::load(names, folder + "/model.safetensors");
  names.join_projections();
}

std::int64_t MiniLm::count_tokens(std::span<const std::string> sentences) const {
  std::size_t count = 0;
  for (const std::string& sentence : sentences) count += word_piece_.encode(sentence, kLongest).size();
  return static_cast<std::int64_t>(count);
}

std::vector<float> MiniLm::embed(std::span<const std::string> sentences) const {
  std::vector<float> rows(sentences.size() * kFeatures);
  std::vector<std::vector<std::int32_t>> batch;
  std::size_t tokens = 0, done = 0;
  const auto flush = [&] {
    if (batch.empty()) return;
    embed_packed(batch, rows.data() + done * kFeatures);
    done += batch.size();
    batch.clear();
    tokens = 0;
  };
  for (const std::string& sentence : sentences) {
    batch.push_back(word_piece_.encode(sentence, kLongest));
    tokens += batch.back().size();
    if (tokens >= kTokensAtOnce) flush();
  }
  flush();
  return rows;
}

void MiniLm::embed_packed(std::span<const std::vector<std::int32_t>> sentences, float* rows) const {
  std::vector<std::int32_t> ends{0};
  for (const auto& ids : sentences) ends.push_back(ends.back() + static_cast<std::int32_t>(ids.size()));
  const nn::Array x(DType::kFloat32, {ends.back(), kFeatures});
  float* to = floats(x);
  for (const auto& ids : sentences) {
    for (std::size_t i = 0; i < ids.size(); ++i, to += kFeatures) {
      const float* word = floats(words_.value) + ids[i] * kFeatures;
      const float* position = floats(positions_.value) + static_cast<std::int64_t>(i) * kFeatures;
      for (std::int64_t c = 0; c < kFeatures; ++c) to[c] = word[c] + position[c] + floats(types_.value)[c];
    }
  }
  nn::AttentionCall call;
  call.cu_seqlens_q = Tensor::contiguous(ends.data(), DType::kInt32, {static_cast<std::int64_t>(ends.size())});
  const nn::Array embedded = norm_.forward(placed(x, device_).view());
  const nn::Array states = placed(encoder_.forward(embedded.view(), call).out, {});

  // The mean over a sentence's tokens, at length 1.
  for (std::size_t s = 0; s < sentences.size(); ++s, rows += kFeatures) {
    double square = 0.0;
    for (std::int64_t c = 0; c < kFeatures; ++c) {
      double sum = 0.0;
      for (std::int64_t r = ends[s]; r < ends[s + 1]; ++r)
        sum += static_cast<double>(floats(states)[r * kFeatures + c]);
      const double mean = sum / (ends[s + 1] - ends[s]);
      rows[c] = static_cast<float>(mean);
      square += mean * mean;
    }
    const auto scale = static_cast<float>(1.0 / std::max(std::sqrt(square), 1e-12));
    for (std::int64_t c = 0; c < kFeatures; ++c) rows[c] *= scale;
  }
}
