// usage: fovea_minitest DEVICE TASK.safetensors HEADS DROPOUT LEARNING_RATE
// The contestant in C++ of python -m fovea.minitest: says who runs its attention; then for every line on stdin one
// training step of an attention layer, and "MILLISECONDS LOSS" on stdout.
#include <fovea/nn/nn.h>
#include <fovea/plan.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <iostream>
#include <span>
#include <string>
#include <string_view>

#include "files/safetensors.h"

namespace {

using namespace fovea;

/// Who runs attention of x [..., heads · head_dim] over itself.
std::string backend_of(const Tensor& x, std::int64_t heads, float dropout, const Tensor& mask, const Tensor& ends) {
  Tensor q = x;  // in place of its projections, which have its size
  q.rank = x.rank + 1;
  q.shape[x.rank - 1] = heads;
  q.shape[x.rank] = x.shape[x.rank - 1] / heads;
  q.strides[x.rank - 1] = q.shape[x.rank];
  q.strides[x.rank] = 1;
  AttentionOptions options;
  options.mask = mask;
  options.dropout = {.probability = dropout};
  options.cu_seqlens_q = options.cu_seqlens_kv = ends;
  if (ends.defined()) options.max_seqlen_q = options.max_seqlen_kv = x.shape[0];
  return plan_forward(describe(Direction::kForward, q, q, q, options), x.device).report().backend;
}

void train(char** words) {
  const Device device{std::string_view(words[1]) == "cuda" ? DeviceKind::kCuda : DeviceKind::kCpu};
  const auto file = files::SafetensorsFile::open(words[2]);
  const auto placed = [&](const char* name) {
    if (!file.entries().contains(name)) return nn::Array();
    const files::OwnedTensor host = file.load(name);
    const Tensor& t = host.view();
    nn::Array array(t.dtype, std::span(t.shape).first(static_cast<std::size_t>(t.rank)), device);
    nn::copy(t, array.view());
    return array;
  };
  const nn::Array input = placed("x"), target = placed("target"), mask = placed("attn_mask");
  const Tensor& x = input.view();
  const files::OwnedTensor ends =
      file.entries().contains("cu_seqlens") ? file.load("cu_seqlens") : files::OwnedTensor{};
  const std::int64_t heads = std::stoll(words[3]);
  const float dropout = std::stof(words[4]);
  Tensor four = mask.view();  // attention's masks have four dimensions
  if (four.defined()) {
    four = Tensor::contiguous(four.data, DType::kBool, {1, 1, four.shape[0], four.shape[1]}, device);
  }
  std::puts(backend_of(x, heads, dropout, four, ends.view()).c_str());
  nn::MultiheadAttention layer({.embed_dim = x.shape[x.rank - 1],
                                .num_heads = heads,
                                .dropout = dropout,
                                .batch_first = true,
                                .dtype = x.dtype,
                                .device = device});
  nn::load(layer, words[2], "weight/");
  nn::AdamW optimiser(layer, {.lr = std::stof(words[5])});
  nn::AttentionCall call;
  call.attn_mask = mask.view();
  call.cu_seqlens_q = ends.view();
  call.training = true;

  for (std::string line; std::getline(std::cin, line); ++call.seed) {
    const auto start = std::chrono::steady_clock::now();
    const auto result = layer.forward(x, x, x, call);
    const auto dout = nn::Array::unset(x.dtype, std::span(x.shape).first(static_cast<std::size_t>(x.rank)), device);
    const nn::Array mean = nn::mean_square(result.out.view(), target.view(), dout.view());
    nn::zero_gradients(layer);
    const auto gradients = layer.backward(*result.state, dout.view());
    optimiser.step();
    float loss = 0.0F;
    nn::copy(mean.view(), Tensor::contiguous(&loss, DType::kFloat32, {1}));  // waits for a GPU
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    std::printf("%.6f %.17g\n", taken.count(), static_cast<double>(loss));
    std::fflush(stdout);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 6) {
    std::fputs("usage: fovea_minitest DEVICE TASK.safetensors HEADS DROPOUT LEARNING_RATE\n", stderr);
    return 2;
  }
  try {
    train(words);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "fovea_minitest: %s\n", error.what());
    return 1;
  }
  return 0;
}
