#pragma once

#include <fovea/nn/nn.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "word_piece.h"

/// all-MiniLM-L6-v2, which gives each sentence a vector of length 1: a BERT of six layers, its outputs averaged.
class MiniLm {
 public:
  /// `folder` holds vocab.txt and model.safetensors.  Throws fovea::Error or std::runtime_error.
  explicit MiniLm(const std::string& folder, const fovea::Device& device = {});

  static constexpr std::int64_t kFeatures = 384;

  /// One row of kFeatures for each sentence.  Sentences are packed one behind the other, without padding.
  [[nodiscard]] std::vector<float> embed(std::span<const std::string> sentences) const;

  [[nodiscard]] std::int64_t count_tokens(std::span<const std::string> sentences) const;

 private:
  void embed_packed(std::span<const std::vector<std::int32_t>> sentences, float* rows) const;

  fovea::Device device_;  // of the encoder; embeddings are looked up on the CPU
  WordPiece word_piece_;
  fovea::nn::Parameter words_, positions_, types_;
  fovea::nn::LayerNorm norm_;
  fovea::nn::TransformerEncoder encoder_;
};
